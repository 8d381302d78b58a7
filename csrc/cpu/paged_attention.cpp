// Attention over a paged KV cache, fp32. See kernels/paged_attention.py for what it computes.
//
// A work item is (sequence, KV head, tile of consecutive queries); the rows of its tile are the queries times the query
// heads of the KV head, so each key and value is read once for all of them. The keys are taken in splits at absolute
// multiples of kSplit, and the splits are merged in order. Within a split every score is one chain of multiply-adds
// over D, every sum of weights runs over lanes at absolute positions, and every output is one chain over the keys:
// nothing in the arithmetic of a row depends on the other rows of its tile, so a result does not depend on the batch,
// on how a prefill was cut, or on the threads.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "attention.h"

namespace {

using namespace axpo;

constexpr int kSplit = 256;    // keys reduced together; results depend on it, so it is one constant
constexpr int kGroup = 32;     // keys handled between two calls of the prefetcher
constexpr int kBlock = 6;      // rows that one product keeps in registers
constexpr int kTileRows = 48;  // rows of a tile of a prefill
constexpr int64_t kAheadBytes = 64 << 10;  // how far memory is fetched ahead of its use

struct Tile {
  const float* q;               // first row of the sequence's first query of the tile, at the first head of the group
  float* out;                   // likewise
  const float *k_cache, *v_cache;  // at the KV head of block 0
  const int32_t* blocks;        // block table of the sequence
  int64_t block_stride;         // floats from one block to the next
  int64_t block_size, dim, group;
  int64_t token_stride;         // floats from one query token to the next
  int64_t tokens;               // queries in the tile
  int64_t position;             // absolute position of the first of them
  float scale;
};

int64_t max_rows(int64_t group) { return std::max<int64_t>(1, kTileRows / group) * group; }

int64_t scratch_size(int64_t group, int64_t dim) {
  const int64_t rows = (max_rows(group) + 7) / 8 * 8;
  return rows * (strips(dim) * kStrip + kSplit + 2 * dim + 6) + strips(dim) * kStrip * kStrip;
}

// Eight keys, or eight values, at consecutive absolute positions from a multiple of 8: `dim` floats apart in one block.
using Octet = const float*;

// scores[r][8 o ..] of MR rows against kOctets octets of keys that are transposed in registers. rows: [strips][..][16].
template <int MR, int kOctets>
AXPO_INLINE void score_direct(const float* rows, int64_t row_total, const Octet* keys, int64_t dim, float* scores) {
  f32x8 acc[MR][kOctets] = {};
  for (int64_t d = 0; d < dim; d += 4) {
    const float* a = rows + d / kStrip * row_total * kStrip + d % kStrip;
    f32x8 columns[kOctets][4];
#pragma GCC unroll 2
    for (int o = 0; o < kOctets; ++o) load_columns4(keys[o] + d, dim, columns[o]);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const float x = a[r * kStrip + k];
#pragma GCC unroll 2
        for (int o = 0; o < kOctets; ++o) acc[r][o] += columns[o][k] * x;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 2
    for (int o = 0; o < kOctets; ++o) store8(scores + r * kSplit + 8 * o, acc[r][o]);
  }
}

template <int MR>
AXPO_INLINE void score_few(const float* rows, int64_t row_total, const Octet* keys, int64_t octets, int64_t dim,
                           float* scores) {
  int64_t o = 0;
  if constexpr (MR <= 2) {  // two octets at once, for enough independent chains
    for (; o + 2 <= octets; o += 2) score_direct<MR, 2>(rows, row_total, keys + o, dim, scores + 8 * o);
  }
  for (; o < octets; ++o) score_direct<MR, 1>(rows, row_total, keys + o, dim, scores + 8 * o);
}

// Two octets of keys transposed into [strips * 16][16], for products with many rows.
AXPO_INLINE void pack_keys(const Octet* keys, int64_t dim, float* out) {
  for (int half = 0; half < 2; ++half) {
    for (int64_t d = 0; d < dim; d += 4) {
      f32x8 columns[4];
      load_columns4(keys[half] + d, dim, columns);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) store8(out + (d + k) * kStrip + 8 * half, columns[k]);
    }
    for (int64_t d = dim; d < strips(dim) * kStrip; ++d) store8(out + d * kStrip + 8 * half, splat8(0.0f));
  }
}

template <int MR>
AXPO_INLINE void score_packed(const float* rows, int64_t row_total, const float* keys, int64_t dim, float* scores) {
  f32x8 acc[MR][2] = {};
  for (int64_t s = 0; s < strips(dim); ++s) {
    fma16<MR, kStrip, 1>(acc, rows + s * row_total * kStrip, keys + s * kStrip * kStrip);
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    store8(scores + r * kSplit, acc[r][0]);
    store8(scores + r * kSplit + 8, acc[r][1]);
  }
}

// out[r][d .. d + 8 NV) += sum over the keys of weights[r][key] * values[key][d ..].
template <int MR, int NV>
AXPO_INLINE void value_block(const float* weights, const Octet* values, int64_t count, int64_t d, int64_t dim,
                             float* out) {
  f32x8 acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < NV; ++c) acc[r][c] = load8(out + r * dim + d + 8 * c);
  }
  for (int64_t start = 0; start < count; start += 8) {
    const float* value = values[start / 8] + d;
    const float* end = value + std::min<int64_t>(8, count - start) * dim;
    for (const float* w = weights + start; value != end; value += dim, ++w) {
      f32x8 v[NV];
#pragma GCC unroll 8
      for (int c = 0; c < NV; ++c) v[c] = load8(value + 8 * c);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const float x = w[r * kSplit];
#pragma GCC unroll 8
        for (int c = 0; c < NV; ++c) acc[r][c] += v[c] * x;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < NV; ++c) store8(out + r * dim + d + 8 * c, acc[r][c]);
  }
}

template <int MR>
AXPO_INLINE void value_rows(const float* weights, const Octet* values, int64_t count, int64_t dim, float* out) {
  constexpr int kWide = MR == 1 ? 8 : MR == 2 ? 4 : 2;  // fills the registers
  int64_t d = 0;
  for (; d + 8 * kWide <= dim; d += 8 * kWide) value_block<MR, kWide>(weights, values, count, d, dim, out);
  for (; d < dim; d += 8) value_block<MR, 1>(weights, values, count, d, dim, out);
}

// Calls f.run<MR>(r) for blocks of MR <= kBlock rows from r that cover 0 .. rows - 1.
template <class F>
AXPO_INLINE void for_row_blocks(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + kBlock <= rows; r += kBlock) f.template run<kBlock>(r);
  switch (rows - r) {
    case 1: return f.template run<1>(r);
    case 2: return f.template run<2>(r);
    case 3: return f.template run<3>(r);
    case 4: return f.template run<4>(r);
    case 5: return f.template run<5>(r);
    default: return;
  }
}

struct FewScores {
  const float* q;
  int64_t row_total;
  const Octet* keys;
  int64_t octets, dim;
  float* scores;
  template <int MR>
  AXPO_INLINE void run(int64_t r) const {
    score_few<MR>(q + r * kStrip, row_total, keys, octets, dim, scores + r * kSplit);
  }
};

struct PackedScores {
  const float* q;
  int64_t row_total;
  const float* keys;
  int64_t dim;
  float* scores;
  template <int MR>
  AXPO_INLINE void run(int64_t r) const {
    score_packed<MR>(q + r * kStrip, row_total, keys, dim, scores + r * kSplit);
  }
};

struct WeightedValues {
  const float* weights;
  const Octet* values;
  int64_t count, dim;
  float* out;
  template <int MR>
  AXPO_INLINE void run(int64_t r) const {
    value_rows<MR>(weights + r * kSplit, values, count, dim, out + r * dim);
  }
};

// Walks over the keys and values that a thread will need, some way ahead of the arithmetic and across the ends of its
// items: the blocks are scattered in memory, so no hardware prefetcher can follow them.
struct Prefetcher {
  const Tile* tile;  // the tile under the cursor
  const Tile* end;
  int64_t key = 0;
  int64_t credit;  // keys that may still be fetched ahead

  AXPO_INLINE void run(int64_t allowance) {
    for (credit += allowance; credit > 0 && tile != end;) {
      const int64_t total = tile->position + tile->tokens, offset = key % tile->block_size;
      const int64_t count = std::min({credit, total - key, tile->block_size - offset});
      const int64_t at = tile->blocks[key / tile->block_size] * tile->block_stride + offset * tile->dim;
      for (int64_t i = 0; i < count * tile->dim; i += 16) {
        __builtin_prefetch(tile->k_cache + at + i);
        __builtin_prefetch(tile->v_cache + at + i);
      }
      credit -= count;
      key += count;
      if (key == total) {
        ++tile;
        key = 0;
      }
    }
  }
};

AXPO_CLONES void attend_tile(const Tile& t, Prefetcher& ahead, float* scratch) {
  const int64_t rows = t.tokens * t.group, row_total = (rows + 7) / 8 * 8, strip_count = strips(t.dim);
  float* q = scratch;
  float* scores = q + row_total * strip_count * kStrip;
  float* part = scores + row_total * kSplit;  // output of the split, then of all splits so far
  float* out = part + row_total * t.dim;
  float* panel = out + row_total * t.dim;
  float* part_peak = panel + strip_count * kStrip * kStrip;  // base 2
  float* part_sum = part_peak + row_total;
  float* peak = part_sum + row_total;
  float* sum = peak + row_total;
  float* keep = sum + row_total;  // factors of the merge
  float* add = keep + row_total;

  const f32x8 factor = splat8(t.scale * kLog2e);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = t.q + r / t.group * t.token_stride + r % t.group * t.dim;
    for (int64_t d = 0; d < strip_count * kStrip; d += 8) {
      store8(q + (d / kStrip * row_total + r) * kStrip + d % kStrip,
             d < t.dim ? load8(from + d) * factor : splat8(0.0f));
    }
  }
  std::fill_n(out, rows * t.dim, 0.0f);
  std::fill_n(part_peak, 6 * row_total, 0.0f);
  std::fill_n(peak, row_total, kNegInf);

  const int64_t key_total = t.position + t.tokens;
  Octet keys[kSplit / 8], values[kSplit / 8];
  for (int64_t start = 0; start < key_total; start += kSplit) {
    const int64_t count = std::min<int64_t>(kSplit, key_total - start), octets = (count + 7) / 8;
    for (int64_t o = 0; o < octets;) {
      const int64_t offset = (start + 8 * o) % t.block_size, block = t.blocks[(start + 8 * o) / t.block_size];
      const int64_t end = std::min(octets, o + (t.block_size - offset) / 8);
      for (int64_t at = block * t.block_stride + offset * t.dim; o < end; ++o, at += 8 * t.dim) {
        keys[o] = t.k_cache + at;
        values[o] = t.v_cache + at;
      }
    }
    if (octets % 2 == 1) keys[octets] = keys[octets - 1];  // fills the panel up; its scores are not looked at

    for (int64_t j = 0; j < count; j += kGroup) {
      const int64_t here = std::min<int64_t>(kGroup, count - j), end = (j + here + 7) / 8;
      ahead.run(here / 2);
      if (rows <= kBlock) {
        for_row_blocks(rows, FewScores{q, row_total, keys + j / 8, end - j / 8, t.dim, scores + j});
        continue;
      }
      for (int64_t o = j / 8; o < end; o += 2) {
        pack_keys(keys + o, t.dim, panel);
        for_row_blocks(rows, PackedScores{q, row_total, panel, t.dim, scores + 8 * o});
      }
    }

    const int64_t width = (count + 7) / 8 * 8;
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + r * kSplit;
      const int64_t seen = std::clamp<int64_t>(t.position + r / t.group + 1 - start, 0, count), full = seen / 8 * 8;
      f32x8 m = splat8(kNegInf);
      for (int64_t j = 0; j < full; j += 8) m = max8(m, load8(row + j));
      if (full < seen) {
        const i32x8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
        const f32x8 masked = lane < static_cast<int32_t>(seen - full) ? load8(row + full) : splat8(kNegInf);
        store8(row + full, masked);
        m = max8(m, masked);
      }
      part_peak[r] = hmax8(m);
      const f32x8 base = splat8(part_peak[r]);
      f32x8 total = splat8(0.0f);
      int64_t j = 0;
      for (; j < seen; j += 8) {
        const f32x8 w = exp2_8(load8(row + j) - base);
        store8(row + j, w);
        total += w;
      }
      for (; j < width; j += 8) store8(row + j, splat8(0.0f));
      part_sum[r] = sum8(total);
    }

    std::fill_n(part, rows * t.dim, 0.0f);
    for (int64_t j = 0; j < count; j += kGroup) {
      const int64_t here = std::min<int64_t>(kGroup, count - j);
      ahead.run(here - here / 2);
      for_row_blocks(rows, WeightedValues{scores + j, values + j / 8, here, t.dim, part});
    }

    // Every row sees key 0, so its maximum is finite from the first split on; a split that it does not see adds 0.
    for (int64_t r = 0; r < row_total; r += 8) {
      const f32x8 before = load8(peak + r), here = load8(part_peak + r), after = max8(before, here);
      const f32x8 a = exp2_8(before - after), b = exp2_8(here - after);
      store8(peak + r, after);
      store8(keep + r, a);
      store8(add + r, b);
      store8(sum + r, load8(sum + r) * a + load8(part_sum + r) * b);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const f32x8 a = splat8(keep[r]), b = splat8(add[r]);
      for (int64_t d = 0; d < t.dim; d += 8) {
        float* at = out + r * t.dim + d;
        store8(at, load8(at) * a + load8(part + r * t.dim + d) * b);
      }
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    const f32x8 inverse = splat8(1.0f / sum[r]);
    float* to = t.out + r / t.group * t.token_stride + r % t.group * t.dim;
    for (int64_t d = 0; d < t.dim; d += 8) store8(to + d, load8(out + r * t.dim + d) * inverse);
  }
}

at::Tensor paged_attention(const at::Tensor& q_in, const at::Tensor& k_cache, const at::Tensor& v_cache,
                           const at::Tensor& block_tables, const at::Tensor& cu_seqlens_q,
                           const at::Tensor& context_lens, double scale) {
  TORCH_CHECK_VALUE(k_cache.is_contiguous() && v_cache.is_contiguous(),
                    "paged_attention: k_cache and v_cache must be contiguous");
  const at::Tensor q = q_in.contiguous(), tables = block_tables.contiguous();
  const at::Tensor starts_tensor = cu_seqlens_q.contiguous(), lengths_tensor = context_lens.contiguous();
  const int64_t tokens = q.size(0), q_heads = q.size(1), dim = q.size(2);
  const int64_t blocks = k_cache.size(0), kv_heads = k_cache.size(1), block_size = k_cache.size(2);
  const int64_t sequences = lengths_tensor.numel(), max_blocks = tables.size(1), group = q_heads / kv_heads;
  TORCH_CHECK_VALUE(dim % 8 == 0 && dim <= 256, "paged_attention: D = ", dim, " must be a multiple of 8 up to 256");
  TORCH_CHECK_VALUE(block_size % 8 == 0, "paged_attention: block_size = ", block_size, " must be a multiple of 8");
  at::Tensor out = at::empty(q.sizes(), q.options());
  const int32_t *table = tables.const_data_ptr<int32_t>(), *starts = starts_tensor.const_data_ptr<int32_t>();
  const int32_t* lengths = lengths_tensor.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(starts[0] == 0 && starts[sequences] == tokens, "paged_attention: cu_seqlens_q runs from ",
                    starts[0], " to ", starts[sequences], ", but q has ", tokens, " rows");

  const float *q_data = q.const_data_ptr<float>(), *k_data = k_cache.const_data_ptr<float>();
  const float* v_data = v_cache.const_data_ptr<float>();
  float* out_data = out.mutable_data_ptr<float>();
  std::vector<Tile> tiles;
  const int64_t tile_tokens = std::max<int64_t>(1, kTileRows / std::max<int64_t>(1, group));
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t count = starts[s + 1] - starts[s];
    TORCH_CHECK_VALUE(count >= 0, "paged_attention: cu_seqlens_q decreases at ", s);
    if (count == 0) continue;
    TORCH_CHECK_VALUE(lengths[s] >= count, "paged_attention: context_lens[", s, "] = ", lengths[s],
                      " is shorter than the sequence's ", count, " queries");
    const int64_t used = (lengths[s] + block_size - 1) / block_size;
    TORCH_CHECK_VALUE(used <= max_blocks, "paged_attention: context_lens[", s, "] = ", lengths[s], " needs ", used,
                      " blocks, but block_tables has ", max_blocks, " columns");
    for (int64_t b = 0; b < used; ++b) {
      const int32_t block = table[s * max_blocks + b];
      TORCH_CHECK_VALUE(block >= 0 && block < blocks, "paged_attention: block_tables[", s, ", ", b, "] = ", block,
                        " is outside the cache of ", blocks, " blocks");
    }
    for (int64_t h = 0; h < kv_heads; ++h) {
      const int64_t head = h * block_size * dim;
      for (int64_t first = (count - 1) / tile_tokens * tile_tokens; first >= 0; first -= tile_tokens) {
        const int64_t offset = ((starts[s] + first) * q_heads + h * group) * dim;
        tiles.push_back({q_data + offset, out_data + offset, k_data + head, v_data + head, table + s * max_blocks,
                         kv_heads * block_size * dim, block_size, dim, group, q_heads * dim,
                         std::min(tile_tokens, count - first), lengths[s] - count + first, static_cast<float>(scale)});
      }
    }
  }

  // Neighbours go to one thread, so that it can fetch ahead; about eight runs a thread keep the threads balanced.
  const int64_t total = static_cast<int64_t>(tiles.size());
  const int64_t run = std::max<int64_t>(1, total / (8 * at::get_num_threads()));
  const int64_t ahead_keys = std::clamp<int64_t>(kAheadBytes / (8 * std::max<int64_t>(dim, 1)), kGroup, kSplit);
  parallel_items((total + run - 1) / run, scratch_size(group, dim), [&](int64_t i, float* scratch) {
    const int64_t end = std::min(total, (i + 1) * run);
    Prefetcher ahead{tiles.data() + i * run, tiles.data() + end, 0, ahead_keys};
    for (int64_t tile = i * run; tile < end; ++tile) attend_tile(tiles[tile], ahead, scratch);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor cu_seqlens_q, "
      "Tensor context_lens, float scale) -> Tensor");
  m.impl("paged_attention", c10::DispatchKey::CPU, TORCH_FN(paged_attention));
}

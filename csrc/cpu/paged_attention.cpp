// Attention over a paged KV cache in fp32 or bf16, all arithmetic in fp32. See kernels/paged_attention.
//
// A work item is a tile: at one KV head, the queries of one sequence, or of neighbouring sequences whose block tables
// begin alike (forks, a common prompt). A key that several of them see is read once for all.
// The keys are taken in splits at absolute multiples of kSplit, and the splits are merged in order. Within a split
// every score is one chain of multiply-adds over D, every sum of weights runs over lanes at absolute positions, and
// every output is one chain over the keys: nothing in the arithmetic of a row depends on the other rows of its tile, so
// a result does not depend on the batch, on what is shared, on how a prefill was cut, or on the threads.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "matrix_unit.h"
#include "paged_matrix.h"
#include "paged_tile.h"

namespace {

template <class Products, class T>
AXPO_INLINE void attend(const Tile& tile, const Cache<T>& c, Prefetcher<T>& ahead, float* scratch) {
  int64_t rows = 0, key_total = 0;
  for (int64_t m = 0; m < tile.count; ++m) {
    rows += tile.members[m].tokens * c.group;
    key_total = std::max(key_total, tile.members[m].keys());
  }
  const int64_t row_total = Products::padded(rows);
  float* q = scratch;
  float* scores = q + Products::query_floats(row_total, c.dim);
  float* part = scores + row_total * kScores;  // output of the split, then of all splits so far
  float* out = part + row_total * c.dim;
  float* panel = out + row_total * c.dim;
  float* part_peak = panel + Products::panel_floats(c.dim);  // base 2
  float* part_sum = part_peak + row_total;
  float* peak = part_sum + row_total;
  float* sum = peak + row_total;
  float* keep = sum + row_total;  // factors of the merge
  float* add = keep + row_total;

  Products products{c, ahead, row_total, q, panel};
  products.begin();
  for (int64_t m = 0, r = 0; m < tile.count; ++m) {
    for (int64_t i = 0; i < tile.members[m].tokens * c.group; ++i, ++r) {
      products.query(r, c.q + tile.members[m].q + i / c.group * c.token_stride + i % c.group * c.dim);
    }
  }
  std::fill_n(out, rows * c.dim, 0.0f);
  std::fill_n(part_peak, 6 * row_total, 0.0f);
  std::fill_n(peak, row_total, kNegInf);

  Run runs[kTileRows * kSplit / kGroup];  // a tile of more rows has one member
  for (int64_t start = 0; start < key_total; start += kSplit) {
    const int64_t run_count = list_runs(tile, c, start, runs);
    for (int64_t i = 0; i < run_count; ++i) {
      products.score(runs[i], scores + runs[i].row * kScores + runs[i].key);
    }

    const int64_t width = std::min<int64_t>(kSplit, (key_total - start + kGroup - 1) / kGroup * kGroup);
    for (int64_t m = 0, r = 0; m < tile.count; ++m) {
      const Member& member = tile.members[m];
      for (int64_t i = 0; i < member.tokens * c.group; ++i, ++r) {
        const int64_t seen = std::clamp<int64_t>(member.position + i / c.group + 1 - start, 0, kSplit);
        softmax_row<Products::kLanes>(scores + r * kScores, seen, width, part_peak + r, part_sum + r);
        products.weights(scores + r * kScores, width);
      }
    }

    std::fill_n(part, rows * c.dim, 0.0f);
    for (int64_t i = 0; i < run_count; ++i) {
      products.value(runs[i], scores + runs[i].row * kScores + runs[i].key, part + runs[i].row * c.dim);
    }

    // Every row sees key 0, so its maximum is finite from the first split on; a split that it does not see adds 0.
    for (int64_t r = 0; r < row_total; r += 8) {
      const f32x8 before = load8(peak + r), here = load8(part_peak + r), after = max8(before, here);
      const f32x8 a = exp2_lanes(before - after), b = exp2_lanes(here - after);
      store8(peak + r, after);
      store8(keep + r, a);
      store8(add + r, b);
      store8(sum + r, load8(sum + r) * a + load8(part_sum + r) * b);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const f32x8 a = splat8(keep[r]), b = splat8(add[r]);
      for (int64_t d = 0; d < c.dim; d += 8) {
        float* at = out + r * c.dim + d;
        store8(at, load8(at) * a + load8(part + r * c.dim + d) * b);
      }
    }
  }

  for (int64_t m = 0, r = 0; m < tile.count; ++m) {
    for (int64_t i = 0; i < tile.members[m].tokens * c.group; ++i, ++r) {
      const f32x8 inverse = splat8(1.0f / sum[r]);
      T* to = c.out + tile.members[m].q + i / c.group * c.token_stride + i % c.group * c.dim;
      for (int64_t d = 0; d < c.dim; d += 8) store_row8(to + d, load8(out + r * c.dim + d) * inverse);
    }
  }
  products.end();
}
template <class Products>
int64_t scratch_of(int64_t group, int64_t dim) {
  const int64_t rows = Products::padded(max_rows(group));
  return Products::query_floats(rows, dim) + rows * (kScores + 2 * dim + 6) + Products::panel_floats(dim);
}

// Sixteen lanes where the processor has registers for them; eight, in the best clone, elsewhere. One function a form:
// templates cannot be cloned.
#define AXPO_ATTEND(target, name, Products)                                                                         \
  target void name(const Tile& tile, const Cache<Products::Element>& c, Prefetcher<Products::Element>& ahead,       \
                   float* scratch) {                                                                                \
    attend<Products>(tile, c, ahead, scratch);                                                                      \
  }
using Wide32 = VectorProducts<16, float>;
using Wide16 = VectorProducts<16, bf16>;
using Narrow32 = VectorProducts<8, float>;
using Narrow16 = VectorProducts<8, bf16>;
using Emulated = MatrixProducts<8, EmulatedUnit>;
AXPO_ATTEND(AXPO_WIDE, attend_wide, Wide32)
AXPO_ATTEND(AXPO_WIDE, attend_wide, Wide16)
AXPO_ATTEND(AXPO_CLONES, attend_narrow, Narrow32)
AXPO_ATTEND(AXPO_CLONES, attend_narrow, Narrow16)
AXPO_ATTEND(AXPO_CLONES, attend_emulated, Emulated)
#ifdef AXPO_AMX
using Amx = MatrixProducts<16, AmxUnit>;
AXPO_ATTEND(AXPO_WIDE, attend_amx, Amx)
#endif
#undef AXPO_ATTEND

// A form of `attend`, and the floats of scratch memory that it needs.
template <class T>
struct Form {
  void (*attend)(const Tile&, const Cache<T>&, Prefetcher<T>&, float*);
  int64_t scratch;
};

template <class T>
Form<T> form_of(int64_t group, int64_t dim) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (dim % kMatrixDepth == 0) {
#ifdef AXPO_AMX
      if (matrix_unit() == MatrixUnit::kAmx) return {attend_amx, scratch_of<Amx>(group, dim)};
#endif
      if (matrix_unit() == MatrixUnit::kEmulated) return {attend_emulated, scratch_of<Emulated>(group, dim)};
    }
  }
  if (has_wide_vectors()) return {attend_wide, scratch_of<VectorProducts<16, T>>(group, dim)};
  return {attend_narrow, scratch_of<VectorProducts<8, T>>(group, dim)};
}

// One sequence with queries.
struct Span {
  int64_t row, tokens, keys;  // first query row, queries, keys
  const int32_t* blocks;
  int64_t shared;  // leading keys in the same blocks as those of the span before it
};

std::vector<Span> list_spans(const at::Tensor& tables, const at::Tensor& cu_seqlens_q, const at::Tensor& context_lens,
                             int64_t rows, int64_t blocks, int64_t block_size, bool share) {
  const int32_t *table = tables.const_data_ptr<int32_t>(), *starts = cu_seqlens_q.const_data_ptr<int32_t>();
  const int32_t* lengths = context_lens.const_data_ptr<int32_t>();
  const int64_t sequences = context_lens.numel(), columns = tables.size(1);
  TORCH_CHECK_VALUE(starts[0] == 0 && starts[sequences] == rows, "paged_attention: cu_seqlens_q runs from ", starts[0],
                    " to ", starts[sequences], ", but q has ", rows, " rows");
  std::vector<Span> spans;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t tokens = starts[s + 1] - starts[s];
    TORCH_CHECK_VALUE(tokens >= 0, "paged_attention: cu_seqlens_q decreases at ", s);
    if (tokens == 0) continue;
    TORCH_CHECK_VALUE(lengths[s] >= tokens, "paged_attention: context_lens[", s, "] = ", lengths[s],
                      " is shorter than the sequence's ", tokens, " queries");
    const int64_t used = (lengths[s] + block_size - 1) / block_size;
    TORCH_CHECK_VALUE(used <= columns, "paged_attention: context_lens[", s, "] = ", lengths[s], " needs ", used,
                      " blocks, but block_tables has ", columns, " columns");
    Span span{starts[s], tokens, lengths[s], table + s * columns, 0};
    for (int64_t b = 0; b < used; ++b) {
      TORCH_CHECK_VALUE(span.blocks[b] >= 0 && span.blocks[b] < blocks, "paged_attention: block_tables[", s, ", ", b,
                        "] = ", span.blocks[b], " is outside the cache of ", blocks, " blocks");
    }
    if (share && !spans.empty()) {
      const Span& before = spans.back();
      const int64_t most = std::min(used, (before.keys + block_size - 1) / block_size);
      span.shared = (std::mismatch(span.blocks, span.blocks + most, before.blocks).first - span.blocks) * block_size;
    }
    spans.push_back(span);
  }
  return spans;
}

template <class T>
void attend_all(const std::vector<Span>& spans, const Cache<T>& cache, int64_t rows, int64_t kv_heads) {
  const int64_t group = cache.group, dim = cache.dim, most_tokens = max_rows(group) / group;
  int64_t member_count = 0;
  for (const Span& s : spans) member_count += kv_heads * ((s.tokens + most_tokens - 1) / most_tokens);
  std::vector<Member> members;
  members.reserve(member_count);  // tiles point into it
  std::vector<Tile> tiles;
  const auto add = [&](const Span& s, int64_t head, int64_t first, int64_t tokens, bool follower) {
    members.push_back({(s.row + first) * cache.token_stride + head * group * dim, s.blocks,
                       head * cache.block_size * dim, tokens, s.keys - s.tokens + first, follower ? s.shared : 0});
    if (follower) {
      ++tiles.back().count;
    } else {
      tiles.push_back({&members.back(), 1});
    }
  };
  // Tiles of several sequences save work, but there must be enough tiles for the threads.
  const int64_t threads = at::get_num_threads();
  const int64_t together = threads == 1 ? most_tokens : std::min(most_tokens, rows * kv_heads / (4 * threads));
  for (size_t s = 0; s < spans.size();) {
    size_t end = s + 1;
    for (int64_t tokens = spans[s].tokens; end < spans.size() && spans[end].shared > 0; ++end) {
      tokens += spans[end].tokens;
      if (tokens > together) break;
    }
    for (int64_t head = 0; head < kv_heads; ++head) {
      if (end == s + 1) {
        for (int64_t first = 0; first < spans[s].tokens; first += most_tokens) {
          add(spans[s], head, first, std::min(most_tokens, spans[s].tokens - first), false);
        }
      } else {
        for (size_t i = s; i < end; ++i) add(spans[i], head, 0, spans[i].tokens, i > s);
      }
    }
    s = end;
  }

  // Neighbours go to one thread, so that it can fetch ahead; about eight runs a thread keep the threads balanced.
  const Form<T> form = form_of<T>(group, dim);
  const int64_t total = static_cast<int64_t>(tiles.size()), run = std::max<int64_t>(1, total / (8 * threads));
  const int64_t row_bytes = 2 * dim * static_cast<int64_t>(sizeof(T));
  const int64_t ahead_keys = std::clamp<int64_t>(kAheadBytes / row_bytes, kGroup, kSplit);
  parallel_items((total + run - 1) / run, form.scratch, [&](int64_t i, float* scratch) {
    const int64_t end = std::min(total, (i + 1) * run);
    Prefetcher<T> ahead{cache, tiles[i * run].members, tiles[end - 1].members + tiles[end - 1].count, ahead_keys};
    for (int64_t tile = i * run; tile < end; ++tile) form.attend(tiles[tile], cache, ahead, scratch);
  });
}

template <class T>
Cache<T> cache_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor& out, double scale) {
  const int64_t q_heads = q.size(1), dim = q.size(2), kv_heads = k.size(1), block_size = k.size(2);
  return {q.const_data_ptr<T>(), k.const_data_ptr<T>(), v.const_data_ptr<T>(), out.mutable_data_ptr<T>(),
          kv_heads * block_size * dim, block_size, dim, q_heads / kv_heads, q_heads * dim, static_cast<float>(scale)};
}

at::Tensor paged_attention(const at::Tensor& q_in, const at::Tensor& k_cache, const at::Tensor& v_cache,
                           const at::Tensor& block_tables, const at::Tensor& cu_seqlens_q,
                           const at::Tensor& context_lens, double scale, bool share) {
  TORCH_CHECK_VALUE(k_cache.is_contiguous() && v_cache.is_contiguous(),
                    "paged_attention: k_cache and v_cache must be contiguous");
  const at::Tensor q = q_in.contiguous(), tables = block_tables.contiguous();
  const at::Tensor starts = cu_seqlens_q.contiguous(), lengths = context_lens.contiguous();
  const int64_t rows = q.size(0), dim = q.size(2), kv_heads = k_cache.size(1), block_size = k_cache.size(2);
  TORCH_CHECK_VALUE(dim % 8 == 0 && dim <= 256, "paged_attention: D = ", dim, " must be a multiple of 8 up to 256");
  TORCH_CHECK_VALUE(block_size % 8 == 0, "paged_attention: block_size = ", block_size, " must be a multiple of 8");
  at::Tensor out = at::empty(q.sizes(), q.options());
  if (out.numel() == 0) return out;
  const std::vector<Span> spans = list_spans(tables, starts, lengths, rows, k_cache.size(0), block_size, share);
  if (q.scalar_type() == at::kBFloat16) {
    attend_all(spans, cache_of<bf16>(q, k_cache, v_cache, out, scale), rows, kv_heads);
  } else {
    attend_all(spans, cache_of<float>(q, k_cache, v_cache, out, scale), rows, kv_heads);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor cu_seqlens_q, "
      "Tensor context_lens, float scale, bool share=True) -> Tensor");
  m.impl("paged_attention", c10::DispatchKey::CPU, TORCH_FN(paged_attention));
}

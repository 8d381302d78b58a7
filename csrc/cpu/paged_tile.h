// The pieces of paged attention that work on one tile: what it is made of, products, softmax. See paged_attention.cpp.
#pragma once

#include "attention.h"

namespace {

using namespace axpo;

constexpr int kSplit = 256;    // keys reduced together; results depend on it, so it is one constant
constexpr int kGroup = 32;     // keys handled between two calls of the prefetcher
constexpr int kBlock = 6;      // rows that one product keeps in registers
constexpr int kTileRows = 48;  // rows of a tile

// The queries of one sequence in a tile.
struct Member {
  const float* q;         // first query, at the first head of the group
  float* out;             // likewise
  const int32_t* blocks;  // block table of the sequence
  int64_t head;           // where the KV head begins in a block
  int64_t tokens;         // queries
  int64_t position;       // absolute position of the first of them
  int64_t shared;         // leading keys whose blocks are those of the member before it in the tile; 0 for the first

  int64_t keys() const { return position + tokens; }
};

struct Tile {
  const Member* members;
  int64_t count;
};

struct Cache {
  const float *k, *v;
  int64_t block_stride, block_size, dim, group;
  int64_t token_stride;  // floats from one query token to the next
  float scale;
};

// Up to kGroup keys, and the rows of the neighbouring members that take them from the same blocks.
struct Run {
  int64_t key, count;          // within the split
  int64_t row, rows;           // within the tile
  int64_t at[kGroup / 8 + 1];  // where its octets begin in the caches; one more, so that a panel can be filled up
};

int64_t max_rows(int64_t group) { return std::max<int64_t>(1, kTileRows / group) * group; }

int64_t scratch_size(int64_t group, int64_t dim) {
  const int64_t rows = (max_rows(group) + 7) / 8 * 8;
  return rows * (strips(dim) * kStrip + kSplit + 2 * dim + 6) + strips(dim) * kStrip * kStrip;
}

// An octet is eight keys, or eight values, at consecutive positions from a multiple of 8: `dim` floats apart in one
// block. It is given by where it begins in the cache `keys` or `values`.

// scores[r][8 o ..] of MR rows against kOctets octets of keys that are transposed in registers. rows: [strips][..][16].
template <int MR, int kOctets>
AXPO_INLINE void score_direct(const float* rows, int64_t row_total, const float* keys, const int64_t* at, int64_t dim,
                              float* scores) {
  f32x8 acc[MR][kOctets] = {};
  for (int64_t d = 0; d < dim; d += 4) {
    const float* a = rows + d / kStrip * row_total * kStrip + d % kStrip;
    f32x8 columns[kOctets][4];
#pragma GCC unroll 2
    for (int o = 0; o < kOctets; ++o) load_columns4(keys + at[o] + d, dim, columns[o]);
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
AXPO_INLINE void score_few(const float* rows, int64_t row_total, const float* keys, const int64_t* at, int64_t octets,
                           int64_t dim, float* scores) {
  int64_t o = 0;
  if constexpr (MR <= 2) {  // two octets at once, for enough independent chains
    for (; o + 2 <= octets; o += 2) score_direct<MR, 2>(rows, row_total, keys, at + o, dim, scores + 8 * o);
  }
  for (; o < octets; ++o) score_direct<MR, 1>(rows, row_total, keys, at + o, dim, scores + 8 * o);
}

// Two octets of keys transposed into [strips * 16][16], for products with many rows.
AXPO_INLINE void pack_keys(const float* keys, const int64_t* at, int64_t dim, float* out) {
  for (int half = 0; half < 2; ++half) {
    for (int64_t d = 0; d < dim; d += 4) {
      f32x8 columns[4];
      load_columns4(keys + at[half] + d, dim, columns);
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
AXPO_INLINE void value_block(const float* weights, const float* values, const int64_t* at, int64_t count, int64_t d,
                             int64_t dim, float* out) {
  f32x8 acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < NV; ++c) acc[r][c] = load8(out + r * dim + d + 8 * c);
  }
  for (int64_t start = 0; start < count; start += 8) {
    const float* value = values + at[start / 8] + d;
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
AXPO_INLINE void value_rows(const float* weights, const float* values, const int64_t* at, int64_t count, int64_t dim,
                            float* out) {
  constexpr int kWide = MR == 1 ? 8 : MR == 2 ? 4 : 2;  // fills the registers
  int64_t d = 0;
  for (; d + 8 * kWide <= dim; d += 8 * kWide) value_block<MR, kWide>(weights, values, at, count, d, dim, out);
  for (; d < dim; d += 8) value_block<MR, 1>(weights, values, at, count, d, dim, out);
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
  const float* keys;
  const int64_t* at;
  int64_t octets, dim;
  float* scores;
  template <int MR>
  AXPO_INLINE void run(int64_t r) const {
    score_few<MR>(q + r * kStrip, row_total, keys, at, octets, dim, scores + r * kSplit);
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
  const float* values;
  const int64_t* at;
  int64_t count, dim;
  float* out;
  template <int MR>
  AXPO_INLINE void run(int64_t r) const {
    value_rows<MR>(weights + r * kSplit, values, at, count, dim, out + r * dim);
  }
};

// Scores to weights: row[0 .. seen) becomes 2^(score - maximum), row[seen .. width) zeros; width is a multiple of 8.
AXPO_INLINE void softmax_row(float* row, int64_t seen, int64_t width, float* peak, float* sum) {
  const int64_t full = seen / 8 * 8;
  f32x8 m = splat8(kNegInf);
  for (int64_t j = 0; j < full; j += 8) m = max8(m, load8(row + j));
  if (full < seen) {
    const i32x8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const f32x8 masked = lane < static_cast<int32_t>(seen - full) ? load8(row + full) : splat8(kNegInf);
    store8(row + full, masked);
    m = max8(m, masked);
  }
  *peak = hmax8(m);
  const f32x8 base = splat8(*peak);
  f32x8 total = splat8(0.0f);
  int64_t j = 0;
  for (; j < seen; j += 8) {
    const f32x8 w = exp2_8(load8(row + j) - base);
    store8(row + j, w);
    total += w;
  }
  for (; j < width; j += 8) store8(row + j, splat8(0.0f));
  *sum = sum8(total);
}

}  // namespace

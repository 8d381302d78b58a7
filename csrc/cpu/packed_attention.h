// Attention of one or two query tokens over the paged cache of a packed model, on one thread. See packed_forward.cpp.
//
// Keys are kept by dimension: a block's are [Hk][D][block_size], so that sixteen of them are a vector; values are
// [Hk][block_size][D]. Two neighbouring tokens read the blocks that they share at once, which changes what is loaded and
// none of the sums: each stays one chain (or two, of even and odd keys) in the order of the keys.
#pragma once

#include <limits>

#include "packed_rows.h"

namespace axpo {

constexpr int64_t kChunk = 16;    // keys of a vector
constexpr int64_t kMostDim = 256;  // of a head

struct Context {
  const int32_t* blocks;
  int64_t keys;    // that the token sees, itself included
  int64_t shared;  // leading blocks that the token behind this one sees as well, both of them whole
};

// One KV head of one layer: where block b's keys and values begin at `keys + b * block_stride`.
struct Plane {
  const float *keys, *values;
  int64_t block_stride, block_size, dim;

  const float* chunk(const int32_t* blocks, int64_t c) const {
    if (block_size == kChunk) return keys + blocks[c] * block_stride;  // no division
    const int64_t per_block = block_size / kChunk;
    return keys + blocks[c / per_block] * block_stride + c % per_block * kChunk;
  }
};

// Scores of kRows queries, [kRows][dim], against kChunks chunks of keys: each one chain over the dimensions.
template <int kRows, int kChunks>
static AXPO_INLINE void score_chunks(const float* q, const Plane& plane, const int32_t* blocks, int64_t first,
                                     float* scores, int64_t stride) {
  const float* at[kChunks];
#pragma GCC unroll 4
  for (int c = 0; c < kChunks; ++c) at[c] = plane.chunk(blocks, first + c);
  f32x16 acc[kRows][kChunks] = {};
  for (int64_t d = 0; d < plane.dim; ++d) {
    f32x16 k[kChunks];
#pragma GCC unroll 4
    for (int c = 0; c < kChunks; ++c) k[c] = load16(at[c] + d * plane.block_size);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const float x = q[r * plane.dim + d];
#pragma GCC unroll 4
      for (int c = 0; c < kChunks; ++c) acc[r][c] += k[c] * x;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kChunks; ++c) store16(scores + r * stride + (first + c) * kChunk, acc[r][c]);
  }
}

// 2^x for x <= 0; 0 below -126.
static AXPO_INLINE f32x16 exp2_16(f32x16 x) {
  const f32x16 low = splat16(-126.0f);
  const f32x16 y = power16(x < low ? low : x);
  return x < low ? splat16(0.0f) : y;
}

// Scores, in base 2, to weights 2^(score - maximum); those from `keys` on become 0. Returns the weights' sum.
static AXPO_INLINE float weigh(float* scores, int64_t keys) {
  const f32x16 nothing = splat16(-std::numeric_limits<float>::infinity());
  const int64_t last = (keys - 1) / kChunk * kChunk;
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const f32x16 tail = lane < static_cast<int32_t>(keys - last) ? load16(scores + last) : nothing;
  f32x16 top = tail;
  for (int64_t j = 0; j < last; j += kChunk) top = top > load16(scores + j) ? top : load16(scores + j);
  const f32x16 peak = splat16(hmax16(top));
  f32x16 sum = {};
  for (int64_t j = 0; j < last; j += kChunk) {
    const f32x16 w = exp2_16(load16(scores + j) - peak);
    store16(scores + j, w);
    sum += w;
  }
  const f32x16 w = exp2_16(tail - peak);
  store16(scores + last, w);
  return sum16(sum + w);
}

// even[r][0 .. 16 kWide) += the sum of weights times values over the keys from `first` on, a block's beginning, up to
// `keys`, and odd likewise: even and odd keys apart. sums: [kRows][dim] each.
template <int kRows, int kWide>
static AXPO_INLINE void mix_columns(const float* weights, int64_t stride, const Plane& plane, const int32_t* block,
                                    int64_t first, int64_t keys, float* even_sums, float* odd_sums) {
  f32x16 even[kRows * kWide], odd[kRows * kWide];
  const int64_t dim = plane.dim, size = plane.block_size;
#pragma GCC unroll 8
  for (int i = 0; i < kRows * kWide; ++i) {
    even[i] = load16(even_sums + i / kWide * dim + i % kWide * 16);
    odd[i] = load16(odd_sums + i / kWide * dim + i % kWide * 16);
  }
  weights += first, block += first / size;
  for (int64_t rest = keys - first; rest > 0; rest -= size, ++block) {
    const float* value = plane.values + *block * plane.block_stride;
    const int64_t count = std::min(size, rest), pairs = (count + 1) / 2;
    for (int64_t j = 0; j < pairs; ++j, value += 2 * dim, weights += 2) {
      // Behind an odd number of keys the last one stands in for what is not there, with the weight 0 that `weigh` left.
      const float* second = 2 * j + 1 < count ? value + dim : value;
#pragma GCC unroll 8
      for (int i = 0; i < kRows * kWide; ++i) {
        even[i] += load16(value + i % kWide * 16) * weights[i / kWide * stride];
        odd[i] += load16(second + i % kWide * 16) * weights[i / kWide * stride + 1];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows * kWide; ++i) {
    store16(even_sums + i / kWide * dim + i % kWide * 16, even[i]);
    store16(odd_sums + i / kWide * dim + i % kWide * 16, odd[i]);
  }
}

// Scores of the keys in chunks first .. end - 1.
template <int kRows>
static AXPO_INLINE void score(const float* q, const Plane& plane, const int32_t* blocks, int64_t first, int64_t end,
                              float* scores, int64_t stride) {
  int64_t c = first;
  for (; c + 4 <= end; c += 4) score_chunks<kRows, 4>(q, plane, blocks, c, scores, stride);
  if (end - c == 3) score_chunks<kRows, 3>(q, plane, blocks, c, scores, stride);
  if (end - c == 2) score_chunks<kRows, 2>(q, plane, blocks, c, scores, stride);
  if (end - c == 1) score_chunks<kRows, 1>(q, plane, blocks, c, scores, stride);
}

template <int kRows>
static AXPO_INLINE void mix(const float* weights, int64_t stride, Plane plane, const int32_t* blocks, int64_t first,
                            int64_t keys, float* even, float* odd) {
  int64_t d = 0;
  for (; d + 32 <= plane.dim; d += 32, plane.values += 32) {
    mix_columns<kRows, 2>(weights, stride, plane, blocks, first, keys, even + d, odd + d);
  }
  if (d < plane.dim) mix_columns<kRows, 1>(weights, stride, plane, blocks, first, keys, even + d, odd + d);
}

// Clones of each number of rows: templates cannot be cloned.
#define AXPO_ROWS(kRows)                                                                                              \
  AXPO_CLONES static void score_##kRows(const float* q, const Plane& plane, const int32_t* blocks, int64_t first,     \
                                        int64_t end, float* scores, int64_t stride) {                                 \
    score<kRows>(q, plane, blocks, first, end, scores, stride);                                                       \
  }                                                                                                                   \
  AXPO_CLONES static void mix_##kRows(const float* weights, int64_t stride, const Plane& plane, const int32_t* blocks, \
                                      int64_t first, int64_t keys, float* even, float* odd) {                         \
    mix<kRows>(weights, stride, plane, blocks, first, keys, even, odd);                                               \
  }
AXPO_ROWS(1)
AXPO_ROWS(2)
AXPO_ROWS(4)
#undef AXPO_ROWS
AXPO_CLONES static void scale_rows(const float* x, float factor, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store16(y + i, load16(x + i) * splat16(factor));
}
AXPO_CLONES static float weigh_row(float* scores, int64_t keys) { return weigh(scores, keys); }
AXPO_CLONES static void join_rows(const float* even, const float* odd, float factor, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store16(out + i, (load16(even + i) + load16(odd + i)) * splat16(factor));
}

// One or two query heads of one or two tokens: `heads` of token t stand at q + t * q_stride, [heads][dim], and the
// outputs replace them. factor: scale log2(e); scores: [4][stride].
static inline void attend(int64_t tokens, int64_t heads, float* q, int64_t q_stride, const Plane& plane,
                          const Context* contexts, float factor, float* scores, int64_t stride) {
  const int64_t width = heads * plane.dim;
  float scaled[4 * kMostDim], even[4 * kMostDim], odd[4 * kMostDim];
  std::fill_n(even, tokens * width, 0.0f), std::fill_n(odd, tokens * width, 0.0f);
  const auto score_heads = heads == 2 ? score_2 : score_1, score_tokens = heads == 2 ? score_4 : score_2;
  const auto mix_heads = heads == 2 ? mix_2 : mix_1, mix_tokens = heads == 2 ? mix_4 : mix_2;
  const int64_t together = tokens == 2 ? contexts[0].shared * plane.block_size : 0;
  for (int64_t t = 0; t < tokens; ++t) scale_rows(q + t * q_stride, factor, scaled + t * width, width);
  if (together > 0) score_tokens(scaled, plane, contexts[0].blocks, 0, together / kChunk, scores, stride);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t chunks = (contexts[t].keys + kChunk - 1) / kChunk;
    score_heads(scaled + t * width, plane, contexts[t].blocks, together / kChunk, chunks, scores + t * heads * stride,
                stride);
  }
  float inverse[4];
  for (int64_t r = 0; r < tokens * heads; ++r) inverse[r] = 1.0f / weigh_row(scores + r * stride, contexts[r / heads].keys);
  if (together > 0) mix_tokens(scores, stride, plane, contexts[0].blocks, 0, together, even, odd);
  for (int64_t t = 0; t < tokens; ++t) {
    mix_heads(scores + t * heads * stride, stride, plane, contexts[t].blocks, together, contexts[t].keys,
              even + t * width, odd + t * width);
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = t * width + h * plane.dim;
      join_rows(even + at, odd + at, inverse[t * heads + h], q + t * q_stride + h * plane.dim, plane.dim);
    }
  }
}

}  // namespace axpo

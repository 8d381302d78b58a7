// Attention of one query token over the paged cache of a packed model, on one thread. See packed_forward.cpp.
//
// Keys are kept by dimension: a block's are [Hk][D][block_size], so that sixteen of them are a vector; values are
// [Hk][block_size][D]. Each token reads its own context whatever the tokens beside it do, so its result cannot depend on
// them; siblings find the blocks that they share in the core's cache.
#pragma once

#include <limits>

#include "packed_rows.h"

namespace axpo {

constexpr int64_t kChunk = 16;    // keys of a vector
constexpr int64_t kMostDim = 256;  // of a head

struct Context {
  const int32_t* blocks;
  int64_t keys;  // that the token sees, itself included
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
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      const float x = q[r * plane.dim + d];
#pragma GCC unroll 4
      for (int c = 0; c < kChunks; ++c) acc[r][c] += k[c] * x;
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kChunks; ++c) store16(scores + r * stride + (first + c) * kChunk, acc[r][c]);
  }
}

// 2^x for x <= 0 (relative error about 1e-7); 0 below -126.
static AXPO_INLINE f32x16 exp2_16(f32x16 x) {
  const f32x16 low = splat16(-126.0f), magic = splat16(12582912.0f);
  const f32x16 c = x < low ? low : x;
  const f32x16 shifted = c + magic;
  const f32x16 r = c - (shifted - magic);
  f32x16 p = splat16(1.5353362e-4f);
  p = p * r + splat16(1.3398874e-3f);
  p = p * r + splat16(9.6184373e-3f);
  p = p * r + splat16(5.5503324e-2f);
  p = p * r + splat16(2.4022648e-1f);
  p = p * r + splat16(6.9314720e-1f);
  p = p * r + splat16(1.0f);
  const i32x16 n = reinterpret_cast<i32x16>(shifted) - reinterpret_cast<i32x16>(magic);
  const f32x16 y = reinterpret_cast<f32x16>(reinterpret_cast<i32x16>(p) + (n << 23));
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

// out[r][0 .. 16 kWide) = sum of weights times values over the keys, even and odd ones apart.
template <int kRows, int kWide>
static AXPO_INLINE void mix(const float* weights, int64_t stride, const float* inverse, const Plane& plane,
                            const Context& context, int64_t d, float* out, int64_t out_stride) {
  f32x16 even[kRows * kWide], odd[kRows * kWide];
#pragma GCC unroll 4
  for (int i = 0; i < kRows * kWide; ++i) even[i] = odd[i] = splat16(0.0f);
  const int32_t* block = context.blocks;
  const int64_t dim = plane.dim, size = plane.block_size;
  for (int64_t rest = context.keys; rest > 0; rest -= size, ++block) {
    const float* value = plane.values + *block * plane.block_stride + d;
    const int64_t count = std::min(size, rest), pairs = (count + 1) / 2;
    for (int64_t j = 0; j < pairs; ++j, value += 2 * dim, weights += 2) {
      // Behind an odd number of keys the last one stands in for what is not there, with the weight 0 that `weigh` left.
      const float* second = 2 * j + 1 < count ? value + dim : value;
      const float w[4] = {weights[0], weights[1], weights[(kRows - 1) * stride], weights[(kRows - 1) * stride + 1]};
#pragma GCC unroll 4
      for (int i = 0; i < kRows * kWide; ++i) {
        even[i] += load16(value + i % kWide * 16) * w[i / kWide * 2];
        odd[i] += load16(second + i % kWide * 16) * w[i / kWide * 2 + 1];
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows * kWide; ++i) {
    store16(out + i / kWide * out_stride + i % kWide * 16, (even[i] + odd[i]) * splat16(inverse[i / kWide]));
  }
}

template <int kRows>
static AXPO_INLINE void score_all(const float* q, const Plane& plane, const Context& context, float* scores,
                                  int64_t stride) {
  const int64_t chunks = (context.keys + kChunk - 1) / kChunk;
  int64_t c = 0;
  for (; c + 4 <= chunks; c += 4) score_chunks<kRows, 4>(q, plane, context.blocks, c, scores, stride);
  if (chunks - c == 3) score_chunks<kRows, 3>(q, plane, context.blocks, c, scores, stride);
  if (chunks - c == 2) score_chunks<kRows, 2>(q, plane, context.blocks, c, scores, stride);
  if (chunks - c == 1) score_chunks<kRows, 1>(q, plane, context.blocks, c, scores, stride);
}

template <int kRows>
static AXPO_INLINE void mix_all(const float* weights, int64_t stride, const float* inverse, const Plane& plane,
                                const Context& context, float* out) {
  int64_t d = 0;
  for (; d + 32 <= plane.dim; d += 32) mix<kRows, 2>(weights, stride, inverse, plane, context, d, out + d, plane.dim);
  if (d < plane.dim) mix<kRows, 1>(weights, stride, inverse, plane, context, d, out + d, plane.dim);
}

AXPO_CLONES static void score_two(const float* q, const Plane& plane, const Context& context, float* to, int64_t n) {
  score_all<2>(q, plane, context, to, n);
}
AXPO_CLONES static void score_one(const float* q, const Plane& plane, const Context& context, float* to, int64_t n) {
  score_all<1>(q, plane, context, to, n);
}
AXPO_CLONES static void mix_two(const float* weights, int64_t stride, const float* inverse, const Plane& plane,
                                const Context& context, float* out) {
  mix_all<2>(weights, stride, inverse, plane, context, out);
}
AXPO_CLONES static void mix_one(const float* weights, int64_t stride, const float* inverse, const Plane& plane,
                                const Context& context, float* out) {
  mix_all<1>(weights, stride, inverse, plane, context, out);
}
AXPO_CLONES static void scale_rows(const float* x, float factor, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store16(y + i, load16(x + i) * splat16(factor));
}
AXPO_CLONES static float weigh_row(float* scores, int64_t keys) { return weigh(scores, keys); }

// One or two query heads of a token, [rows][dim], which the outputs replace. factor: scale log2(e); scores: [2][stride].
static inline void attend_heads(int64_t rows, float* q, const Plane& plane, const Context& context, float factor,
                                float* scores, int64_t stride) {
  float scaled[2 * kMostDim], inverse[2];
  scale_rows(q, factor, scaled, rows * plane.dim);
  (rows == 2 ? score_two : score_one)(scaled, plane, context, scores, stride);
  for (int64_t r = 0; r < rows; ++r) inverse[r] = 1.0f / weigh_row(scores + r * stride, context.keys);
  (rows == 2 ? mix_two : mix_one)(scores, stride, inverse, plane, context, q);
}

}  // namespace axpo

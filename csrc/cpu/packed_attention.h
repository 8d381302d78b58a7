// Attention of one or two query tokens over the paged cache of a packed model, on one thread. See packed_forward.cpp.
//
// Keys are kept by dimension: a block's are [Hk][D][block_size], so that sixteen of them are a vector; values are
// [Hk][block_size][D]. Two neighbouring tokens go together: they read the blocks that they share once, and then each its
// own side by side, as one's chains fill the time in which the other's wait. This changes none of the sums: each stays
// one chain (or two, of even and odd keys) in the order of the keys.
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

// Scores of kRows queries of each of kTokens tokens, [kTokens][kRows][dim], against kChunks chunks of the token's keys,
// blocks[token]: each one chain over the dimensions.
template <int kTokens, int kRows, int kChunks>
static AXPO_INLINE void score_chunks(const float* q, const Plane& plane, const int32_t* const* blocks, int64_t first,
                                     float* scores, int64_t stride) {
  const float* at[kTokens * kChunks];
#pragma GCC unroll 8
  for (int i = 0; i < kTokens * kChunks; ++i) at[i] = plane.chunk(blocks[i / kChunks], first + i % kChunks);
  f32x16 acc[kTokens * kRows][kChunks] = {};
  for (int64_t d = 0; d < plane.dim; ++d) {
    f32x16 k[kTokens * kChunks];
#pragma GCC unroll 8
    for (int i = 0; i < kTokens * kChunks; ++i) k[i] = load16(at[i] + d * plane.block_size);
#pragma GCC unroll 4
    for (int r = 0; r < kTokens * kRows; ++r) {
      const float x = q[r * plane.dim + d];
#pragma GCC unroll 4
      for (int c = 0; c < kChunks; ++c) acc[r][c] += k[r / kRows * kChunks + c] * x;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kTokens * kRows; ++r) {
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

// Scores of kRows rows, in base 2, to weights 2^(score - maximum); those from `keys` on become 0. inverse[r] becomes 1
// over the weights' sum. Rows side by side, as each is a chain that waits for itself.
template <int kRows>
static AXPO_INLINE void weigh(float* scores, int64_t stride, int64_t keys, float* inverse) {
  const f32x16 nothing = splat16(-std::numeric_limits<float>::infinity());
  const int64_t last = (keys - 1) / kChunk * kChunk;
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  f32x16 tail[kRows], top[kRows], sum[kRows] = {};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    top[r] = tail[r] = lane < static_cast<int32_t>(keys - last) ? load16(scores + r * stride + last) : nothing;
  }
  for (int64_t j = 0; j < last; j += kChunk) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const f32x16 x = load16(scores + r * stride + j);
      top[r] = top[r] > x ? top[r] : x;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) top[r] = splat16(hmax16(top[r]));
  for (int64_t j = 0; j < last; j += kChunk) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const f32x16 w = exp2_16(load16(scores + r * stride + j) - top[r]);
      store16(scores + r * stride + j, w);
      sum[r] += w;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const f32x16 w = exp2_16(tail[r] - top[r]);
    store16(scores + r * stride + last, w);
    inverse[r] = 1.0f / sum16(sum[r] + w);
  }
}

// even[r][0 .. 16 kWide) += the sum of weights times values over the keys from `first` on, a block's beginning, up to
// `keys`, and odd likewise: even and odd keys apart. For each of kTokens tokens, whose values are in blocks[token];
// sums: [kTokens][kRows][dim] each.
template <int kTokens, int kRows, int kWide>
static AXPO_INLINE void mix_columns(const float* weights, int64_t stride, const Plane& plane,
                                    const int32_t* const* blocks, int64_t first, int64_t keys, float* even_sums,
                                    float* odd_sums) {
  constexpr int kSums = kTokens * kRows * kWide;  // vectors: token by token, row by row
  f32x16 even[kSums], odd[kSums];
  const int64_t dim = plane.dim, size = plane.block_size;
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) {
    even[i] = load16(even_sums + i / kWide * dim + i % kWide * 16);
    odd[i] = load16(odd_sums + i / kWide * dim + i % kWide * 16);
  }
  weights += first;
  int64_t block = first / size;
  for (int64_t rest = keys - first; rest > 0; rest -= size, ++block) {
    const float* value[kTokens];
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) value[t] = plane.values + blocks[t][block] * plane.block_stride;
    const int64_t count = std::min(size, rest), pairs = (count + 1) / 2;
    for (int64_t j = 0; j < pairs; ++j, weights += 2) {
      // Behind an odd number of keys the last one stands in for what is not there, with the weight 0 that `weigh` left.
      const int64_t second = 2 * j + 1 < count ? dim : 0;
#pragma GCC unroll 8
      for (int i = 0; i < kSums; ++i) {
        const float *at = value[i / (kRows * kWide)] + 2 * j * dim + i % kWide * 16, *w = weights + i / kWide * stride;
        even[i] += load16(at) * w[0];
        odd[i] += load16(at + second) * w[1];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) {
    store16(even_sums + i / kWide * dim + i % kWide * 16, even[i]);
    store16(odd_sums + i / kWide * dim + i % kWide * 16, odd[i]);
  }
}

// Scores of the keys in chunks first .. end - 1.
template <int kTokens, int kRows>
static AXPO_INLINE void score(const float* q, const Plane& plane, const int32_t* const* blocks, int64_t first,
                              int64_t end, float* scores, int64_t stride) {
  int64_t c = first;
  for (; c + 4 <= end; c += 4) score_chunks<kTokens, kRows, 4>(q, plane, blocks, c, scores, stride);
  if (end - c == 3) score_chunks<kTokens, kRows, 3>(q, plane, blocks, c, scores, stride);
  if (end - c == 2) score_chunks<kTokens, kRows, 2>(q, plane, blocks, c, scores, stride);
  if (end - c == 1) score_chunks<kTokens, kRows, 1>(q, plane, blocks, c, scores, stride);
}

template <int kTokens, int kRows>
static AXPO_INLINE void mix(const float* weights, int64_t stride, Plane plane, const int32_t* const* blocks,
                            int64_t first, int64_t keys, float* even, float* odd) {
  int64_t d = 0;
  for (; d + 32 <= plane.dim; d += 32, plane.values += 32) {
    mix_columns<kTokens, kRows, 2>(weights, stride, plane, blocks, first, keys, even + d, odd + d);
  }
  if (d < plane.dim) {
    mix_columns<kTokens, kRows, 1>(weights, stride, plane, blocks, first, keys, even + d, odd + d);
  }
}

// Clones of each number of tokens and rows: templates cannot be cloned.
#define AXPO_ROWS(kTokens, kRows)                                                                                     \
  AXPO_CLONES static void score_##kTokens##x##kRows(const float* q, const Plane& plane, const int32_t* const* blocks, \
                                                    int64_t first, int64_t end, float* scores, int64_t stride) {      \
    score<kTokens, kRows>(q, plane, blocks, first, end, scores, stride);                                              \
  }                                                                                                                   \
  AXPO_CLONES static void mix_##kTokens##x##kRows(const float* weights, int64_t stride, const Plane& plane,           \
                                                  const int32_t* const* blocks, int64_t first, int64_t keys,          \
                                                  float* even, float* odd) {                                          \
    mix<kTokens, kRows>(weights, stride, plane, blocks, first, keys, even, odd);                                      \
  }
AXPO_ROWS(1, 1)
AXPO_ROWS(1, 2)
AXPO_ROWS(1, 4)
AXPO_ROWS(2, 1)
AXPO_ROWS(2, 2)
#undef AXPO_ROWS
AXPO_CLONES static void weigh_1(float* scores, int64_t stride, int64_t keys, float* inverse) {
  weigh<1>(scores, stride, keys, inverse);
}
AXPO_CLONES static void weigh_2(float* scores, int64_t stride, int64_t keys, float* inverse) {
  weigh<2>(scores, stride, keys, inverse);
}
AXPO_CLONES static void scale_rows(const float* x, float factor, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store16(y + i, load16(x + i) * splat16(factor));
}
AXPO_CLONES static void join_rows(const float* even, const float* odd, float factor, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store16(out + i, (load16(even + i) + load16(odd + i)) * splat16(factor));
}

// One or two query heads of one or two tokens: `heads` of token t stand at q + t * q_stride, [heads][dim], and the
// outputs replace them. factor: scale log2(e); scores: [4][stride].
static inline void attend(int64_t tokens, int64_t heads, float* q, int64_t q_stride, const Plane& plane,
                          const Context* contexts, float factor, float* scores, int64_t stride) {
  const int64_t width = heads * plane.dim;
  alignas(64) float scaled[4 * kMostDim], even[4 * kMostDim], odd[4 * kMostDim];
  std::fill_n(even, tokens * width, 0.0f), std::fill_n(odd, tokens * width, 0.0f);
  const bool two = heads == 2;
  const auto weigh_heads = two ? weigh_2 : weigh_1;
  const auto score_heads = two ? score_1x2 : score_1x1, score_shared = two ? score_1x4 : score_1x2;
  const auto mix_heads = two ? mix_1x2 : mix_1x1, mix_shared = two ? mix_1x4 : mix_1x2;
  const auto score_both = two ? score_2x2 : score_2x1;
  const auto mix_both = two ? mix_2x2 : mix_2x1;
  const int32_t* blocks[2] = {contexts[0].blocks, contexts[tokens - 1].blocks};
  // Two tokens read keys up to `shared` at the same places, and then up to `both` at once, each its own.
  const int64_t shared = tokens == 2 ? contexts[0].shared * plane.block_size : 0;
  int64_t both = tokens == 2 ? std::min(contexts[0].keys, contexts[1].keys) : 0;
  if (tokens == 2 && contexts[0].keys != contexts[1].keys) both -= both % plane.block_size;
  const int64_t chunks = (both + kChunk - 1) / kChunk;
  for (int64_t t = 0; t < tokens; ++t) scale_rows(q + t * q_stride, factor, scaled + t * width, width);
  if (shared > 0) score_shared(scaled, plane, blocks, 0, shared / kChunk, scores, stride);
  if (both > shared) score_both(scaled, plane, blocks, shared / kChunk, chunks, scores, stride);
  float inverse[4];
  for (int64_t t = 0; t < tokens; ++t) {
    score_heads(scaled + t * width, plane, blocks + t, chunks, (contexts[t].keys + kChunk - 1) / kChunk,
                scores + t * heads * stride, stride);
    weigh_heads(scores + t * heads * stride, stride, contexts[t].keys, inverse + t * heads);
  }
  if (shared > 0) mix_shared(scores, stride, plane, blocks, 0, shared, even, odd);
  if (both > shared) mix_both(scores, stride, plane, blocks, shared, both, even, odd);
  for (int64_t t = 0; t < tokens; ++t) {
    if (contexts[t].keys > both) {
      mix_heads(scores + t * heads * stride, stride, plane, blocks + t, both, contexts[t].keys, even + t * width,
                odd + t * width);
    }
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = t * width + h * plane.dim;
      join_rows(even + at, odd + at, inverse[t * heads + h], q + t * q_stride + h * plane.dim, plane.dim);
    }
  }
}

}  // namespace axpo

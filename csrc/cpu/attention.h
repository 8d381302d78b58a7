// Building blocks of the CPU attention kernels: a register-blocked product, transposing loads, work distribution.
//
// A matrix [rows, D] is kept "in strips": [ceil(D / 16)][rows][16], the last strip padded with zeros. Then every
// operand of every product below has constant strides.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "common.h"

namespace axpo {

constexpr int64_t kStrip = 16;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

static AXPO_INLINE int64_t strips(int64_t dim) { return (dim + kStrip - 1) / kStrip; }

// acc[r][c] += sum over k < 16 of a[r * kRow + k * kStep] * b[k * 16 + 8 c .. + 8], in the order of k.
template <int MR, int kRow, int kStep>
static AXPO_INLINE void fma16(f32x8 (&acc)[MR][2], const float* a, const float* b) {
#pragma GCC unroll 4
  for (int k = 0; k < 16; ++k) {
    const f32x8 b0 = load8(b + 16 * k), b1 = load8(b + 16 * k + 8);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const float x = a[r * kRow + k * kStep];
      acc[r][0] += b0 * x;
      acc[r][1] += b1 * x;
    }
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define AXPO_SHUFFLE 1
#endif
#endif

// Columns of eight rows, `stride` floats apart: columns[k][j] = rows[j * stride + k] for k < 4. Half rows are joined
// while they are loaded, which leaves only shuffles within 128 bits.
static AXPO_INLINE void load_columns4(const float* rows, int64_t stride, f32x8 (&columns)[4]) {
#ifdef AXPO_SHUFFLE
  const float* upper = rows + 4 * stride;
  f32x8 r[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const f32x4_unaligned low = *reinterpret_cast<const f32x4_unaligned*>(rows + j * stride);
    const f32x4_unaligned high = *reinterpret_cast<const f32x4_unaligned*>(upper + j * stride);
    r[j] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
  }
  const f32x8 a = __builtin_shufflevector(r[0], r[1], 0, 8, 1, 9, 4, 12, 5, 13);
  const f32x8 b = __builtin_shufflevector(r[0], r[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const f32x8 c = __builtin_shufflevector(r[2], r[3], 0, 8, 1, 9, 4, 12, 5, 13);
  const f32x8 d = __builtin_shufflevector(r[2], r[3], 2, 10, 3, 11, 6, 14, 7, 15);
  columns[0] = __builtin_shufflevector(a, c, 0, 1, 8, 9, 4, 5, 12, 13);
  columns[1] = __builtin_shufflevector(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
  columns[2] = __builtin_shufflevector(b, d, 0, 1, 8, 9, 4, 5, 12, 13);
  columns[3] = __builtin_shufflevector(b, d, 2, 3, 10, 11, 6, 7, 14, 15);
#else
  for (int k = 0; k < 4; ++k) {
    for (int j = 0; j < 8; ++j) columns[k][j] = rows[j * stride + k];
  }
#endif
}

// 2^x for x <= 0 (relative error about 1e-7); exactly 0 below -126, so -inf gives 0.
static AXPO_INLINE f32x8 exp2_8(f32x8 x) {
  const f32x8 low = splat8(-126.0f), magic = splat8(12582912.0f);
  const f32x8 c = x < low ? low : x;
  const f32x8 shifted = c + magic;
  const f32x8 r = c - (shifted - magic);
  f32x8 p = splat8(1.5353362e-4f);
  p = p * r + splat8(1.3398874e-3f);
  p = p * r + splat8(9.6184373e-3f);
  p = p * r + splat8(5.5503324e-2f);
  p = p * r + splat8(2.4022648e-1f);
  p = p * r + splat8(6.9314720e-1f);
  p = p * r + splat8(1.0f);
  const i32x8 n = reinterpret_cast<i32x8>(shifted) - reinterpret_cast<i32x8>(magic);
  const f32x8 y = reinterpret_cast<f32x8>(reinterpret_cast<i32x8>(p) + (n << 23));
  return x < low ? splat8(0.0f) : y;
}

// Uninitialised floats on a cache line boundary, freed with the owner.
struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;
static inline Buffer buffer(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 127) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes);
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(static_cast<float*>(p));
}

// Runs body(item, scratch) for item = 0 .. items - 1; threads take the next item as they become free, so put the heavy
// items first. Which thread runs an item must not matter to its result. scratch: `floats` floats a thread.
template <class Body>
static inline void parallel_items(int64_t items, int64_t floats, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(items, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const Buffer scratch = buffer(floats);
      for (int64_t item = next++; item < items; item = next++) body(item, scratch.get());
    }
  });
}

}  // namespace axpo

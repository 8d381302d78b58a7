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

#include "lanes.h"

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

// Columns of eight rows, `stride` floats apart: columns[k][j] = rows[j * stride + k] for k < 4.
static AXPO_INLINE void load_columns4(const float* rows, int64_t stride, f32x8 (&columns)[4]) {
  transpose4<8>(reinterpret_cast<const char*>(rows), nullptr, stride * static_cast<int64_t>(sizeof(float)), columns);
}

// 2^x for x <= 0 (relative error about 1e-7); exactly 0 below -126, so -inf gives 0.
template <int kLanes>
AXPO_INLINE typename Lanes<kLanes>::V exp2_lanes(typename Lanes<kLanes>::V x) {
  using V = typename Lanes<kLanes>::V;
  using I = typename Lanes<kLanes>::I;
  const V low = -126.0f - V{}, magic = 12582912.0f - V{};
  const V c = x < low ? low : x;
  const V shifted = c + magic;
  const V r = c - (shifted - magic);
  V p = 1.5353362e-4f - V{};
  p = p * r + 1.3398874e-3f;
  p = p * r + 9.6184373e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.9314720e-1f;
  p = p * r + 1.0f;
  const I n = reinterpret_cast<I>(shifted) - reinterpret_cast<I>(magic);
  const V y = reinterpret_cast<V>(reinterpret_cast<I>(p) + (n << 23));
  return x < low ? V{} : y;
}
static AXPO_INLINE f32x8 exp2_8(f32x8 x) { return exp2_lanes<8>(x); }

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

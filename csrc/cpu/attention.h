// Building blocks of the CPU attention kernels: transposing loads, powers of two, buffers, work distribution.
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

// Columns of eight rows, `stride` floats apart: columns[k][j] = rows[j * stride + k] for k < 4.
static AXPO_INLINE void load_columns4(const float* rows, int64_t stride, f32x8 (&columns)[4]) {
  transpose4<8>(reinterpret_cast<const char*>(rows), nullptr, stride * static_cast<int64_t>(sizeof(float)), columns);
}

// 2^x for x <= 0 (relative error about 1e-7); exactly 0 below -126, so -inf gives 0.
template <class V>
static AXPO_INLINE V exp2_lanes(V x) {
  const V low = splat<V>(-126.0f);
  return x < low ? V{} : power(x < low ? low : x);
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

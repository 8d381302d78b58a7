// Vectors of 8 or 16 floats for tree attention: the same tile code is compiled for 256 and for 512 bits.
#pragma once

#include <c10/util/BFloat16.h>

#include "attention.h"

namespace axpo {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));

// The register tile of a product: kBlock rows times two vectors. With 512 bits and 32 registers the two vectors are
// different strips (or panels) of 16 floats; with 256 bits and 16 registers they are the two halves of one.
struct Narrow {
  using Vector = f32x8;
  using Integers = i32x8;
  static constexpr int kLanes = 8, kBlock = 6, kPair = 1;  // kPair: strips or panels that a register tile spans
};
struct Wide {
  using Vector = f32x16;
  using Integers = i32x16;
  static constexpr int kLanes = 16, kBlock = 12, kPair = 2;
};

template <class V>
static AXPO_INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
static AXPO_INLINE void store(float* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
// For constants. A scalar from memory is better left a scalar operand: gcc 12 may assemble a splat of it lane by lane.
template <class V>
static AXPO_INLINE V splat(float x) {
  return x - V{};
}
template <class V>
static AXPO_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}

static AXPO_INLINE f32x8 halved_max(f32x8 v) { return v; }
static AXPO_INLINE f32x8 halved_max(f32x16 v) {
  f32x8 half[2];
  std::memcpy(half, &v, sizeof(v));
  return max8(half[0], half[1]);
}
static AXPO_INLINE float sum_lanes(f32x8 v) { return sum8(v); }
static AXPO_INLINE float sum_lanes(f32x16 v) {
  f32x8 half[2];
  std::memcpy(half, &v, sizeof(v));
  return sum8(half[0] + half[1]);
}

// exp2_8 of attention.h in either width.
template <class Isa>
static AXPO_INLINE typename Isa::Vector exp2_lanes(typename Isa::Vector x) {
  using V = typename Isa::Vector;
  using I = typename Isa::Integers;
  const V low = splat<V>(-126.0f), magic = splat<V>(12582912.0f);
  const V c = x < low ? low : x;
  const V shifted = c + magic;
  const V r = c - (shifted - magic);
  V p = splat<V>(1.5353362e-4f);
  p = p * r + splat<V>(1.3398874e-3f);
  p = p * r + splat<V>(9.6184373e-3f);
  p = p * r + splat<V>(5.5503324e-2f);
  p = p * r + splat<V>(2.4022648e-1f);
  p = p * r + splat<V>(6.9314720e-1f);
  p = p * r + splat<V>(1.0f);
  const I n = reinterpret_cast<I>(shifted) - reinterpret_cast<I>(magic);
  const V y = reinterpret_cast<V>(reinterpret_cast<I>(p) + (n << 23));
  return x < low ? splat<V>(0.0f) : y;
}

// acc[r][n] += sum over k < 16 of a[r * kRow + k * kStep] * b_n[k * 16 ..], in the order of k.
template <class V, int MR, int kRow, int kStep>
static AXPO_INLINE void fma16_pair(V (&acc)[MR][2], const float* a, const float* b0, const float* b1) {
#pragma GCC unroll 4
  for (int k = 0; k < 16; ++k) {
    const V v0 = load<V>(b0 + 16 * k), v1 = load<V>(b1 + 16 * k);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const float x = a[r * kRow + k * kStep];
      acc[r][0] += v0 * x;
      acc[r][1] += v1 * x;
    }
  }
}

// ---- elements in memory: fp32, or bf16 that is widened on the way in and rounded to nearest even on the way out ----

typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));

static AXPO_INLINE f32x8 load_elements(const float* p) { return load8(p); }
static AXPO_INLINE f32x8 load_elements(const c10::BFloat16* p) {
  u16x8 raw;
  std::memcpy(&raw, p, sizeof(raw));
  return reinterpret_cast<f32x8>(__builtin_convertvector(raw, u32x8) << 16);
}
static AXPO_INLINE void store_elements(float* p, f32x8 v) { store8(p, v); }
static AXPO_INLINE void store_elements(c10::BFloat16* p, f32x8 v) {
  const u32x8 bits = reinterpret_cast<u32x8>(v);
  const u32x8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u16x8 raw = __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40, u16x8);
  std::memcpy(p, &raw, sizeof(raw));
}

}  // namespace axpo

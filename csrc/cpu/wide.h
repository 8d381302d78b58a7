// Sixteen floats: one AVX-512 register, or as many smaller ones as it takes. For code whose clones (AXPO_CLONES) all do
// the same arithmetic.
#pragma once

#include "common.h"

namespace axpo {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef float f32x16_unaligned __attribute__((vector_size(64), aligned(4), may_alias));

static AXPO_INLINE f32x16 load16(const float* p) { return *reinterpret_cast<const f32x16_unaligned*>(p); }
static AXPO_INLINE void store16(float* p, f32x16 v) { *reinterpret_cast<f32x16_unaligned*>(p) = v; }
static AXPO_INLINE f32x16 splat16(float x) { return x - f32x16{}; }

// Sum of the lanes in one fixed tree order.
static AXPO_INLINE float sum16(f32x16 v) {
  float lanes[16];
  store16(lanes, v);
  return sum8(load8(lanes) + load8(lanes + 8));
}

static AXPO_INLINE float hmax16(f32x16 v) {
  float lanes[16];
  store16(lanes, v);
  return hmax8(max8(load8(lanes), load8(lanes + 8)));
}

// 2^x for -126 <= x <= 126 (relative error about 1e-7).
static AXPO_INLINE f32x16 power16(f32x16 x) {
  const f32x16 magic = splat16(12582912.0f);  // adding it rounds to the nearest integer, which its low bits then hold
  const f32x16 shifted = x + magic;
  const f32x16 r = x - (shifted - magic);
  f32x16 p = splat16(1.5353362e-4f);
  p = p * r + splat16(1.3398874e-3f);
  p = p * r + splat16(9.6184373e-3f);
  p = p * r + splat16(5.5503324e-2f);
  p = p * r + splat16(2.4022648e-1f);
  p = p * r + splat16(6.9314720e-1f);
  p = p * r + splat16(1.0f);
  return reinterpret_cast<f32x16>(reinterpret_cast<i32x16>(p) + (reinterpret_cast<i32x16>(shifted) << 23));
}

// exp8 of sixteen lanes, with the same bits.
static AXPO_INLINE f32x16 exp16(f32x16 x) {
  const f32x16 low = splat16(-87.33654f), high = splat16(88.72f);
  f32x16 c = x < low ? low : x;
  c = c > high ? high : c;
  const f32x16 magic = splat16(12582912.0f);
  const f32x16 shifted = c * splat16(1.44269504088896341f) + magic;
  const f32x16 n = shifted - magic;
  f32x16 r = c - n * splat16(0.693359375f);
  r = r - n * splat16(-2.12194440e-4f);
  f32x16 p = splat16(1.9875691500e-4f);
  p = p * r + splat16(1.3981999507e-3f);
  p = p * r + splat16(8.3334519073e-3f);
  p = p * r + splat16(4.1665795894e-2f);
  p = p * r + splat16(1.6666665459e-1f);
  p = p * r + splat16(5.0000001201e-1f);
  p = p * (r * r) + r + splat16(1.0f);
  const i32x16 e = reinterpret_cast<i32x16>(shifted) - reinterpret_cast<i32x16>(magic), half = e >> 1;
  const f32x16 s1 = reinterpret_cast<f32x16>((half + 127) << 23);
  const f32x16 s2 = reinterpret_cast<f32x16>((e - half + 127) << 23);
  f32x16 y = p * s1 * s2;
  y = x < low ? splat16(0.0f) : y;
  return x == x ? y : x;
}

}  // namespace axpo

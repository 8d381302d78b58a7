// Vectors of eight or sixteen floats, and bf16 in memory: read as floats, and rounded to nearest when written.
#pragma once

#include <c10/util/BFloat16.h>

#include "common.h"

namespace axpo {

using bf16 = c10::BFloat16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x16_unaligned __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint16_t u16x8_unaligned __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint16_t u16x16_unaligned __attribute__((vector_size(32), aligned(2), may_alias));

// Vectors of kLanes floats. Where kernels use them, lanes are different results and never parts of one sum, so their
// number does not change a result.
template <int kLanes>
struct Lanes;

template <>
struct Lanes<8> {
  using V = f32x8;
  using I = i32x8;
  static AXPO_INLINE V load(const float* p) { return load8(p); }
  static AXPO_INLINE V load(const bf16* p) {
    const u16x8_unaligned bits = *reinterpret_cast<const u16x8_unaligned*>(p);
    return reinterpret_cast<V>(__builtin_convertvector(bits, u32x8) << 16);
  }
  static AXPO_INLINE void store(float* p, V v) { store8(p, v); }
};

template <>
struct Lanes<16> {
  using V = f32x16;
  using I = i32x16;
  static AXPO_INLINE V load(const float* p) { return *reinterpret_cast<const f32x16_unaligned*>(p); }
  static AXPO_INLINE V load(const bf16* p) {
    const u16x16_unaligned bits = *reinterpret_cast<const u16x16_unaligned*>(p);
    return reinterpret_cast<V>(__builtin_convertvector(bits, u32x16) << 16);
  }
  static AXPO_INLINE void store(float* p, V v) { *reinterpret_cast<f32x16_unaligned*>(p) = v; }
};

static AXPO_INLINE f32x8 load_row8(const float* p) { return load8(p); }
static AXPO_INLINE f32x8 load_row8(const bf16* p) { return Lanes<8>::load(p); }

static AXPO_INLINE void store_row8(float* p, f32x8 v) { store8(p, v); }
static AXPO_INLINE void store_row8(bf16* p, f32x8 v) {  // rounds to nearest, ties to even; NaN stays NaN
  const u32x8 bits = reinterpret_cast<u32x8>(v);
  const u32x8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u32x8 kept = v == v ? rounded : u32x8{} + 0x7fc0;
  *reinterpret_cast<u16x8_unaligned*>(p) = __builtin_convertvector(kept, u16x8);
}

static AXPO_INLINE float load_one(const float* p) { return *p; }
static AXPO_INLINE float load_one(const bf16* p) { return static_cast<float>(*p); }
static AXPO_INLINE void store_one(float* p, float v) { *p = v; }
static AXPO_INLINE void store_one(bf16* p, float v) { *p = bf16(v); }

}  // namespace axpo

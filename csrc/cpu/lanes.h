// Vectors whose number of lanes is a template's argument, and bf16 in memory: read as floats, rounded to nearest when
// written.
#pragma once

#include <c10/util/BFloat16.h>

#include "common.h"

namespace axpo {

using bf16 = c10::BFloat16;

typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint16_t u16x8_unaligned __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint16_t u16x16_unaligned __attribute__((vector_size(32), aligned(2), may_alias));

// Vectors of kLanes floats.
template <int kLanes>
struct Lanes;

template <>
struct Lanes<8> {
  using V = f32x8;
  using I = Bits<V>;
  static AXPO_INLINE V load(const float* p) { return load8(p); }
  static AXPO_INLINE V load(const bf16* p) {
    const u16x8_unaligned bits = *reinterpret_cast<const u16x8_unaligned*>(p);
    return reinterpret_cast<V>(__builtin_convertvector(bits, u32x8) << 16);
  }
  static AXPO_INLINE void store(float* p, V v) { store8(p, v); }
  static AXPO_INLINE float sum(V v) { return sum8(v); }
  static AXPO_INLINE float max(V v) { return hmax8(v); }
};

template <>
struct Lanes<16> {
  using V = f32x16;
  using I = Bits<V>;
  static AXPO_INLINE V load(const float* p) { return load16(p); }
  static AXPO_INLINE V load(const bf16* p) {
    const u16x16_unaligned bits = *reinterpret_cast<const u16x16_unaligned*>(p);
    return reinterpret_cast<V>(__builtin_convertvector(bits, u32x16) << 16);
  }
  static AXPO_INLINE void store(float* p, V v) { store16(p, v); }
  static AXPO_INLINE float sum(V v) { return sum16(v); }
  static AXPO_INLINE float max(V v) { return hmax16(v); }
};

// Rows that a product of two vectors' width keeps in registers: there are 32 of 16 lanes, or 16 of 8.
template <int kLanes>
constexpr int kRegisterRows = kLanes == 16 ? 8 : 6;

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define AXPO_SHUFFLE 1
#endif
#endif

typedef float f32x4 __attribute__((vector_size(16)));
static AXPO_INLINE f32x4 load4(const char* p) { return *reinterpret_cast<const f32x4_unaligned*>(p); }

// Four columns of kLanes rows in units of 32 bits: columns[i][j] = unit i of row j. Rows are `stride` bytes apart, the
// first eight from `rows` on, of sixteen the others from `upper` on. Parts of rows are joined while they are loaded,
// which leaves only shuffles within 128 bits.
template <int kLanes>
AXPO_INLINE void transpose4(const char* rows, const char* upper, int64_t stride,
                            typename Lanes<kLanes>::V (&columns)[4]);

#ifdef AXPO_SHUFFLE
template <>
AXPO_INLINE void transpose4<8>(const char* rows, const char*, int64_t stride, f32x8 (&columns)[4]) {
  f32x8 r[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = __builtin_shufflevector(load4(rows + j * stride), load4(rows + (j + 4) * stride), 0, 1, 2, 3, 4, 5, 6, 7);
  }
  const f32x8 a = __builtin_shufflevector(r[0], r[1], 0, 8, 1, 9, 4, 12, 5, 13);
  const f32x8 b = __builtin_shufflevector(r[0], r[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const f32x8 c = __builtin_shufflevector(r[2], r[3], 0, 8, 1, 9, 4, 12, 5, 13);
  const f32x8 d = __builtin_shufflevector(r[2], r[3], 2, 10, 3, 11, 6, 14, 7, 15);
  columns[0] = __builtin_shufflevector(a, c, 0, 1, 8, 9, 4, 5, 12, 13);
  columns[1] = __builtin_shufflevector(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
  columns[2] = __builtin_shufflevector(b, d, 0, 1, 8, 9, 4, 5, 12, 13);
  columns[3] = __builtin_shufflevector(b, d, 2, 3, 10, 11, 6, 7, 14, 15);
}

template <>
AXPO_INLINE void transpose4<16>(const char* rows, const char* upper, int64_t stride, f32x16 (&columns)[4]) {
  f32x16 r[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // rows j, j + 4, j + 8, j + 12
    const f32x4 a = load4(rows + j * stride), b = load4(rows + (j + 4) * stride);
    const f32x4 c = load4(upper + j * stride), d = load4(upper + (j + 4) * stride);
    const f32x8 low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
    const f32x8 high = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7);
    r[j] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
#define AXPO_SHUFFLE16(x, y, i, j, k, l)                                                                            \
  __builtin_shufflevector(x, y, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12, \
                          k + 12, l + 12)
  const f32x16 a = AXPO_SHUFFLE16(r[0], r[1], 0, 16, 1, 17), b = AXPO_SHUFFLE16(r[0], r[1], 2, 18, 3, 19);
  const f32x16 c = AXPO_SHUFFLE16(r[2], r[3], 0, 16, 1, 17), d = AXPO_SHUFFLE16(r[2], r[3], 2, 18, 3, 19);
  columns[0] = AXPO_SHUFFLE16(a, c, 0, 1, 16, 17), columns[1] = AXPO_SHUFFLE16(a, c, 2, 3, 18, 19);
  columns[2] = AXPO_SHUFFLE16(b, d, 0, 1, 16, 17), columns[3] = AXPO_SHUFFLE16(b, d, 2, 3, 18, 19);
#undef AXPO_SHUFFLE16
}
#else
template <int kLanes>
AXPO_INLINE void transpose4(const char* rows, const char* upper, int64_t stride,
                            typename Lanes<kLanes>::V (&columns)[4]) {
  for (int j = 0; j < kLanes; ++j) {
    float row[4];
    std::memcpy(row, j < 8 ? rows + j * stride : upper + (j - 8) * stride, sizeof row);
    for (int i = 0; i < 4; ++i) columns[i][j] = row[i];
  }
}
#endif

// Stores column i of 32-bit units of T in rows of `width` floats: one fp32, or two bf16 of which the lower half is first.
template <int kLanes>
AXPO_INLINE void store_column(float* to, int64_t width, int i, typename Lanes<kLanes>::V v, const float*) {
  Lanes<kLanes>::store(to + i * width, v);
}
template <int kLanes>
AXPO_INLINE void store_column(float* to, int64_t width, int i, typename Lanes<kLanes>::V v, const bf16*) {
  using V = typename Lanes<kLanes>::V;
  const auto pair = reinterpret_cast<typename Lanes<kLanes>::I>(v);
  Lanes<kLanes>::store(to + 2 * i * width, reinterpret_cast<V>(pair << 16));
  Lanes<kLanes>::store(to + (2 * i + 1) * width, reinterpret_cast<V>(pair & static_cast<int32_t>(0xffff0000)));
}

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

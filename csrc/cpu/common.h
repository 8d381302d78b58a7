// Shared by the CPU kernels: run-time instruction-set dispatch, and vectors of eight and of sixteen floats.
//
// Every .cpp of this directory registers its own operators in its own fragment:
//     TORCH_LIBRARY_FRAGMENT(axpo, m) {
//       m.def("op(Tensor x) -> Tensor");
//       m.impl("op", c10::DispatchKey::CPU, TORCH_FN(op));
//     }
// so a file can be added without touching another; setup.py compiles whatever lies here. There is no pybind: the
// library is loaded by kernels/_library.py, which is also where fake and autograd rules are attached from Python.
//
// How a kernel is written:
//   * the hot loop is a static function marked AXPO_CLONES: gcc compiles it once per instruction set and the
//     loader picks by CPUID, so one binary runs on any x86-64. What it calls must be AXPO_INLINE (or a lambda-free
//     template of such), else the callee keeps the baseline instruction set and is a real call;
//   * OpenMP (at::parallel_for) stays OUTSIDE the cloned functions: an outlined parallel region is not cloned;
//   * sums that feed a result are written in one fixed order (explicit vector lanes), never left to the number of
//     threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__)
#if __GNUC__ >= 12
#define AXPO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // the micro-architecture levels are matched by CPU model before gcc 12, features are not
#define AXPO_CLONES __attribute__((target_clones("avx512f", "fma", "default")))
#endif
#else
#define AXPO_CLONES
#endif

// A function with the 32 vector registers of AVX-512, for code whose blocking is not that of eight lanes; called only
// where has_wide_vectors(). Marked by hand because templates cannot be cloned.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && __GNUC__ >= 12
#define AXPO_WIDE_TARGET 1
#define AXPO_WIDE __attribute__((target("arch=x86-64-v4")))
#else
#define AXPO_WIDE
#endif

#if defined(__GNUC__)
#define AXPO_INLINE inline __attribute__((always_inline))
#else
#define AXPO_INLINE inline
#endif

namespace axpo {

// Whether the processor has what AXPO_WIDE functions are compiled for, and the compiler could be told so.
static inline bool has_wide_vectors() {
#ifdef AXPO_WIDE_TARGET
  static const bool has = __builtin_cpu_supports("x86-64-v4");
  return has;
#else
  return false;
#endif
}

// Eight floats: one AVX register, or two SSE/NEON ones; and sixteen: one AVX-512 register, or as many smaller ones as
// it takes. gcc and clang lower them on every target. `may_alias` and the one-float alignment make loads through float
// pointers legal and unaligned.
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef float f32x4_unaligned __attribute__((vector_size(16), aligned(4), may_alias));
typedef float f32x8_unaligned __attribute__((vector_size(32), aligned(4), may_alias));
typedef float f32x16_unaligned __attribute__((vector_size(64), aligned(4), may_alias));

static AXPO_INLINE f32x8 load8(const float* p) { return *reinterpret_cast<const f32x8_unaligned*>(p); }
static AXPO_INLINE f32x16 load16(const float* p) { return *reinterpret_cast<const f32x16_unaligned*>(p); }
static AXPO_INLINE void store8(float* p, f32x8 v) { *reinterpret_cast<f32x8_unaligned*>(p) = v; }
static AXPO_INLINE void store16(float* p, f32x16 v) { *reinterpret_cast<f32x16_unaligned*>(p) = v; }
// Written as x - 0, which gcc folds to one broadcast; a braced list of eight x it sometimes assembles lane by lane.
template <class V>
static AXPO_INLINE V splat(float x) {
  return x - V{};
}
static AXPO_INLINE f32x8 splat8(float x) { return splat<f32x8>(x); }
static AXPO_INLINE f32x16 splat16(float x) { return splat<f32x16>(x); }
template <class V>
static AXPO_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}
static AXPO_INLINE f32x8 max8(f32x8 a, f32x8 b) { return maximum(a, b); }

// Sum and maximum of the lanes, in one fixed tree order.
static AXPO_INLINE float sum8(f32x8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
static AXPO_INLINE float hmax8(f32x8 v) {
  float a = v[0] > v[4] ? v[0] : v[4], b = v[1] > v[5] ? v[1] : v[5];
  float c = v[2] > v[6] ? v[2] : v[6], d = v[3] > v[7] ? v[3] : v[7];
  a = a > c ? a : c;
  b = b > d ? b : d;
  return a > b ? a : b;
}
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

// The exponentials below give a value the same bits in a vector of either width. V is f32x8 or f32x16; Bits<V> are its
// lanes as int32_t.
template <class V>
using Bits = decltype(V{} < V{});

// 1.5 * 2^23: adding it rounds to the nearest integer, which the low bits then hold.
constexpr float kMagic = 12582912.0f;

// 2^x for -126 <= x <= 126 (relative error about 1e-7).
template <class V>
static AXPO_INLINE V power(V x) {
  const V magic = splat<V>(kMagic);
  const V shifted = x + magic;
  const V r = x - (shifted - magic);
  V p = splat<V>(1.5353362e-4f);
  p = p * r + splat<V>(1.3398874e-3f);
  p = p * r + splat<V>(9.6184373e-3f);
  p = p * r + splat<V>(5.5503324e-2f);
  p = p * r + splat<V>(2.4022648e-1f);
  p = p * r + splat<V>(6.9314720e-1f);
  p = p * r + splat<V>(1.0f);
  return reinterpret_cast<V>(reinterpret_cast<Bits<V>>(p) + (reinterpret_cast<Bits<V>>(shifted) << 23));
}
static AXPO_INLINE f32x16 power16(f32x16 x) { return power(x); }

// e^x for x <= 88.7 (relative error about 1e-7). Below -87.3, where fp32 leaves its normal range, the result is 0;
// -inf gives 0 and NaN gives NaN. Larger x than 88.7 is clamped.
// x = n ln2 + r with |r| <= ln2/2; e^r by a degree-6 polynomial; 2^n through the exponent bits.
template <class V>
static AXPO_INLINE V exponential(V x) {
  const V low = splat<V>(-87.33654f), high = splat<V>(88.72f), magic = splat<V>(kMagic);
  V c = x < low ? low : x;
  c = c > high ? high : c;
  const V shifted = c * splat<V>(1.44269504088896341f) + magic;
  const V n = shifted - magic;
  V r = c - n * splat<V>(0.693359375f);
  r = r - n * splat<V>(-2.12194440e-4f);
  V p = splat<V>(1.9875691500e-4f);
  p = p * r + splat<V>(1.3981999507e-3f);
  p = p * r + splat<V>(8.3334519073e-3f);
  p = p * r + splat<V>(4.1665795894e-2f);
  p = p * r + splat<V>(1.6666665459e-1f);
  p = p * r + splat<V>(5.0000001201e-1f);
  p = p * (r * r) + r + splat<V>(1.0f);
  // The low bits of `shifted` hold n; p lies in [0.7, 1.42), so n is added to its exponent in two halves to stay in
  // range at both ends.
  const Bits<V> e = reinterpret_cast<Bits<V>>(shifted) - reinterpret_cast<Bits<V>>(magic), half = e >> 1;
  const V s1 = reinterpret_cast<V>((half + 127) << 23);
  const V s2 = reinterpret_cast<V>((e - half + 127) << 23);
  V y = p * s1 * s2;
  y = x < low ? splat<V>(0.0f) : y;
  return x == x ? y : x;
}
static AXPO_INLINE f32x8 exp8(f32x8 x) { return exponential(x); }
static AXPO_INLINE f32x16 exp16(f32x16 x) { return exponential(x); }

}  // namespace axpo

// One row of logits: temperature, maximum, and the sums behind log-probability and entropy. Used by the sampler and
// by the trainer's loss, so that equal logits give equal bits on both sides. Include before anything else: the pragma
// turns fused multiply-add off in what follows, which makes the sampler's arithmetic the same on every machine.
#pragma once

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <algorithm>
#include <limits>

#include "common.h"

namespace axpo {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

static AXPO_INLINE f32x8 load_tail(const float* p, int64_t n, float fill) {
  float buffer[8];
  for (int64_t i = 0; i < 8; ++i) buffer[i] = i < n ? p[i] : fill;
  return load8(buffer);
}

// z = logits / temperature. Returns the largest z; *invalid becomes true when one is NaN or +inf.
static AXPO_INLINE float scale_row(const float* logits, float* z, int64_t n, float temperature, bool* invalid) {
  const f32x8 t = splat8(temperature), inf = splat8(kInfinity);
  const bool divide = temperature != 1.0f;  // x / 1 is x
  f32x8 top = splat8(-kInfinity);
  i32x8 bad = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const f32x8 v = divide ? load8(logits + i) / t : load8(logits + i);
    top = max8(v, top);
    bad |= !(v < inf);
    store8(z + i, v);
  }
  if (i < n) {
    const f32x8 v = load_tail(logits + i, n - i, -kInfinity) / t;
    top = max8(v, top);
    bad |= !(v < inf);
    for (int64_t j = 0; i + j < n; ++j) z[i + j] = v[j];
  }
  int32_t any = 0;
  for (int lane = 0; lane < 8; ++lane) any |= bad[lane];
  *invalid = any != 0;
  return hmax8(top);
}

// Adds eight entries; the largest ones, whose e^0 = 1 would swallow the rest, are counted apart.
static AXPO_INLINE void softmax_add(f32x8 z, f32x8 max, f32x8* sum, f32x8* centred, i32x8* largest) {
  const f32x8 d = max8(z - max, splat8(-100.0f)), e = exp8(d), zero = splat8(0.0f);  // e^-100 = 0; keeps -inf * 0 out
  *largest -= d == zero;
  *sum += d < zero ? e : zero;
  *centred += e * d;
}

// sum = Σ e^{z−max} and centred = Σ e^{z−max} (z−max): logsumexp = max + log(sum), entropy = log(sum) − centred/sum.
// Measuring z from the maximum keeps the entropy exact under any common offset. fp32 lanes over 1024 entries, then fp64.
static AXPO_INLINE void softmax_sums(const float* z, int64_t n, float max, double* sum, double* centred) {
  constexpr int64_t kSpan = 1024;
  const f32x8 m = splat8(max);
  double total = 0, total_centred = 0;
  for (int64_t first = 0; first < n; first += kSpan) {
    const int64_t last = first + kSpan < n ? first + kSpan : n;
    f32x8 s = splat8(0.0f), t = s;
    i32x8 largest = {};
    int64_t i = first;
    for (; i + 8 <= last; i += 8) softmax_add(load8(z + i), m, &s, &t, &largest);
    if (i < last) softmax_add(load_tail(z + i, last - i, -kInfinity), m, &s, &t, &largest);
    for (int lane = 0; lane < 8; ++lane) total += largest[lane];
    total += sum8(s), total_centred += sum8(t);
  }
  *sum = total, *centred = total_centred;
}

// A row is reduced in chunks of so many columns, which are merged in order: wherever a chunk is made, in the LM head or
// from logits in memory, the bits are the same.
constexpr int64_t kColumns = 1024;

// Of some of a row's z: the largest, Σ e^{z−max} and Σ e^{z−max} (z−max).
struct RowSums {
  double max = -kInfinity, sum = 0, centred = 0;
};

// z = logits / temperature and its sums; a NaN or +inf makes sum NaN, which reaches every result.
static AXPO_INLINE RowSums reduce_chunk(const float* logits, float* z, int64_t n, float temperature) {
  bool invalid;
  RowSums out;
  const float max = scale_row(logits, z, n, temperature, &invalid);
  softmax_sums(z, n, max, &out.sum, &out.centred);
  out.max = max;
  if (invalid) out.sum = std::numeric_limits<double>::quiet_NaN();
  return out;
}

// Moves both sums to the new maximum; the centred one also shifts by sum * (old - new).
static inline void merge_sums(RowSums& s, const RowSums& other) {
  const double max = std::max(s.max, other.max), shift = s.max - max, other_shift = other.max - max;
  const double a = s.sum == 0 ? 0 : std::exp(shift), b = other.sum == 0 ? 0 : std::exp(other_shift);
  s.centred = (a == 0 ? 0 : a * (s.centred + s.sum * shift)) + (b == 0 ? 0 : b * (other.centred + other.sum * other_shift));
  s.sum = a * s.sum + b * other.sum;
  s.max = max;
}

}  // namespace axpo

// Matrix products for models whose weights fit a core's caches: a row's bits do not depend on the rows beside it.
//
// A weight [N, K] is kept in panels, [ceil(N / 32)][K][32], its last panel padded with zeros (kernels/packed). Every
// value of a product is one chain of multiply-adds over K, so neither the number of rows nor the threads nor the width
// of the processor's vectors change it (but for the fused multiply-add, which the oldest processors lack).
#pragma once

#include <algorithm>

#include "common.h"

namespace axpo {

constexpr int64_t kPanel = 32;

// What becomes of a product.
enum class Then { kStore, kAdd, kSwiglu, kGelu, kGeluTanh };

// out[r][n] = then(sum over k of x[r][k] * w[n][k] + bias[n]), of `rows` rows.
// kAdd adds to what `out` holds. kSwiglu: the panels hold 16 gates, then their 16 ups, and `out` gets silu(gate) * up.
struct Product {
  const float* x;
  int64_t x_stride, rows, inner;
  const float* panels;
  const float* bias;  // padded to whole panels, or null
  int64_t columns;
  float* out;
  int64_t out_stride;
  Then then;
};

// x / (1 + e^-x), of which e^-x is 2^t; beyond the clamps it is 0 or x but for less than 1e-36.
static AXPO_INLINE f32x16 silu16(f32x16 x) {
  const f32x16 low = splat16(-126.0f), high = splat16(126.0f);
  f32x16 t = x * splat16(-1.44269504f);
  t = t < low ? low : t;
  t = t > high ? high : t;
  return x / (splat16(1.0f) + power16(t));
}

// 0.5 x (1 + tanh(u)) = x sigmoid(2 u).
static AXPO_INLINE f32x16 gelu_tanh16(f32x16 x) {
  const f32x16 u = splat16(1.5957691216f) * (x + splat16(0.044715f) * (x * x * x));
  return x / (splat16(1.0f) + exp16(-u));
}

// 0.5 x (1 + erf(x / sqrt(2))), the error function by Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7).
static AXPO_INLINE f32x16 gelu16(f32x16 x) {
  const f32x16 z = x * splat16(0.70710678f), size = z < splat16(0.0f) ? -z : z;
  const f32x16 t = splat16(1.0f) / (splat16(1.0f) + splat16(0.3275911f) * size);
  f32x16 p = splat16(1.061405429f);
  p = p * t + splat16(-1.453152027f);
  p = p * t + splat16(1.421413741f);
  p = p * t + splat16(-0.284496736f);
  p = p * t + splat16(0.254829592f);
  const f32x16 tail = p * t * exp16(-(z * z));  // 1 - erf(|z|)
  return splat16(0.5f) * x * (z < splat16(0.0f) ? tail : splat16(2.0f) - tail);
}

template <Then kThen>
static AXPO_INLINE void finish(const Product& p, int64_t row, int64_t column, f32x16 a, f32x16 b) {
  if (p.bias != nullptr) a += load16(p.bias + column), b += load16(p.bias + column + 16);
  if constexpr (kThen == Then::kSwiglu) {
    store16(p.out + row * p.out_stride + column / 2, silu16(a) * b);
    return;
  }
  if constexpr (kThen == Then::kGelu) a = gelu16(a), b = gelu16(b);
  if constexpr (kThen == Then::kGeluTanh) a = gelu_tanh16(a), b = gelu_tanh16(b);
  float* to = p.out + row * p.out_stride + column;
  const int64_t count = p.columns - column;
  if (count < kPanel) {  // the last panel: columns beyond N are padding
    float tail[kPanel];
    store16(tail, a), store16(tail + 16, b);
    for (int64_t i = 0; i < count; ++i) to[i] = kThen == Then::kAdd ? to[i] + tail[i] : tail[i];
    return;
  }
  if constexpr (kThen == Then::kAdd) a += load16(to), b += load16(to + 16);
  store16(to, a), store16(to + 16, b);
}

template <int MR, Then kThen>
static AXPO_INLINE void product_block(const Product& p, const float* panel, int64_t row, int64_t column) {
  f32x16 acc[MR][2] = {};
  const float* x = p.x + row * p.x_stride;
  for (int64_t k = 0; k < p.inner; ++k, panel += kPanel) {
    const f32x16 b0 = load16(panel), b1 = load16(panel + 16);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const float value = x[r * p.x_stride + k];
      acc[r][0] += b0 * value;
      acc[r][1] += b1 * value;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) finish<kThen>(p, row + r, column, acc[r][0], acc[r][1]);
}

template <int kRows, Then kThen>
static AXPO_INLINE void product_as(const Product& p) {
  const float* panel = p.panels;
  for (int64_t column = 0; column < p.columns; column += kPanel, panel += p.inner * kPanel) {
    int64_t row = 0;
    for (; row + kRows <= p.rows; row += kRows) product_block<kRows, kThen>(p, panel, row, column);
    const int64_t rest = p.rows - row;
    if constexpr (kRows > 4) {
      if (rest == 7) product_block<7, kThen>(p, panel, row, column);
      if (rest == 6) product_block<6, kThen>(p, panel, row, column);
      if (rest == 5) product_block<5, kThen>(p, panel, row, column);
      if (rest == 4) product_block<4, kThen>(p, panel, row, column);
      if (rest == 3) product_block<3, kThen>(p, panel, row, column);
    }
    if constexpr (kRows > 2) {
      if (rest == 2) product_block<2, kThen>(p, panel, row, column);
    }
    if (rest == 1) product_block<1, kThen>(p, panel, row, column);
  }
}

template <int kRows>
static AXPO_INLINE void product_of(const Product& p) {
  switch (p.then) {
    case Then::kStore: return product_as<kRows, Then::kStore>(p);
    case Then::kAdd: return product_as<kRows, Then::kAdd>(p);
    case Then::kSwiglu: return product_as<kRows, Then::kSwiglu>(p);
    case Then::kGelu: return product_as<kRows, Then::kGelu>(p);
    case Then::kGeluTanh: return product_as<kRows, Then::kGeluTanh>(p);
  }
}

// Computes a product on the calling thread. Defined in packed_product.cpp.
void product(const Product& p);

}  // namespace axpo

// What a packed model does to single rows between its products: norms, rotary embedding, sums. All sizes are multiples
// of 16, or of 8 for the halves of a head.
#pragma once

#include "common.h"

namespace axpo {

// y = w x / rms(x)
static AXPO_INLINE void rms_row(const float* x, const float* w, float* y, int64_t n, float eps) {
  f32x16 squares = {};
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 v = load16(x + i);
    squares += v * v;
  }
  const f32x16 inverse = splat16(1.0f / std::sqrt(sum16(squares) / n + eps));
  for (int64_t i = 0; i < n; i += 16) store16(y + i, load16(w + i) * (load16(x + i) * inverse));
}

// (x - mean) / deviation * w + b
static AXPO_INLINE void layer_norm_row(const float* x, const float* w, const float* b, float* y, int64_t n, float eps) {
  f32x16 total = {};
  for (int64_t i = 0; i < n; i += 16) total += load16(x + i);
  const f32x16 mean = splat16(sum16(total) / n);
  f32x16 squares = {};
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 v = load16(x + i) - mean;
    squares += v * v;
  }
  const f32x16 inverse = splat16(1.0f / std::sqrt(sum16(squares) / n + eps));
  for (int64_t i = 0; i < n; i += 16) store16(y + i, (load16(x + i) - mean) * inverse * load16(w + i) + load16(b + i));
}

static AXPO_INLINE void add_row(const float* x, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store16(to + i, load16(to + i) + load16(x + i));
}

// Rotates a head [2 half] in place by the angles whose cosines and sines, [half] each, are given.
static AXPO_INLINE void rotate_head(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += 8) {
    const f32x8 a = load8(x + i), b = load8(x + half + i), c = load8(cos + i), s = load8(sin + i);
    store8(x + i, a * c - b * s);
    store8(x + half + i, b * c + a * s);
  }
}

}  // namespace axpo

// The sweep of one query tile over the keys that it sees, forward and backward. See tree_attention.cpp.
#pragma once

#include "tree_tile.h"

namespace {

// Queries [first, first + count) of one head. The caller fills in q and the panels of the KV head, and takes acc times
// `inverse`, and lse, which is natural.
struct ForwardTile {
  const Shape& s;
  const Visibility& vis;
  int64_t first, count;
  const float *k_transposed, *v_rows;
  float *q, *acc, *scores, *peak, *sum, *decay, *fresh, *inverse, *lse;

  static int64_t scratch(const Shape& s) { return 2 * kRows * s.padded() + kRows * kCols + 6 * kRows; }

  ForwardTile(const Shape& shape, const Visibility& visibility, int64_t first_, int64_t count_, float* scratch)
      : s(shape), vis(visibility), first(first_), count(count_) {
    float** rows[] = {&peak, &sum, &decay, &fresh, &inverse, &lse};
    q = scratch;
    acc = q + kRows * s.padded();
    scores = acc + kRows * s.padded();
    float* next = scores + kRows * kCols;
    for (float** row : rows) *row = next, next += kRows;
  }
};

// The next panels that the tile sees, at most kGroup from `panel` on, which moves past them.
AXPO_INLINE int64_t next_panels(const Visibility& vis, int64_t first, int64_t panel_end, int64_t& panel,
                                int64_t* found) {
  int64_t n = 0;
  for (; panel < panel_end && n < kGroup; ++panel) {
    if (vis.seen(panel, first)) found[n++] = panel;
  }
  return n;
}

AXPO_INLINE void mask_panels(const Visibility& vis, const int64_t* panels, int64_t n, int64_t first, int64_t last,
                             int64_t row_count, float* scores) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t p = panels[i];
    if (vis.full(p, first, last)) continue;
    mask_panel(vis.end.data() + p * kPanel, p * kPanel, first, row_count, scores + i * kPanel);
  }
}

AXPO_INLINE void addresses(const float* base, int64_t size, const int64_t* panels, int64_t n, const float** out) {
  for (int64_t i = 0; i < n; ++i) out[i] = base + panels[i] * size;
}

template <class Isa>
AXPO_INLINE void forward_sweep(const ForwardTile& a) {
  using V = typename Isa::V;
  constexpr int kLanes = Isa::kLanes, kVectors = kPanel / kLanes;
  const Shape& s = a.s;
  const int64_t last = a.first + a.count - 1;
  const int64_t row_count = (a.count + Isa::kBlock - 1) / Isa::kBlock * Isa::kBlock;
  std::fill_n(a.acc, kRows * s.padded(), 0.0f);
  std::fill_n(a.peak, kRows, kNegInf);
  std::fill_n(a.sum, kRows, 0.0f);

  int64_t panels[kGroup];
  const float *keys[kGroup], *values[kGroup];
  for (int64_t p = 0;;) {
    const int64_t n = next_panels(a.vis, a.first, last / kPanel + 1, p, panels);
    if (n == 0) break;
    addresses(a.k_transposed, s.panel_size(), panels, n, keys);
    addresses(a.v_rows, s.panel_size(), panels, n, values);
    row_products<Isa>(a.q, keys, n, s.strips, row_count, a.scores);
    mask_panels(a.vis, panels, n, a.first, last, row_count, a.scores);

    for (int64_t r = 0; r < row_count; ++r) {
      const float* row = a.scores + r * kCols;
      V m = Isa::load(row);
      for (int j = 1; j < kVectors * n; ++j) m = maximum(m, Isa::load(row + kLanes * j));
      a.fresh[r] = Isa::max(m);
    }
    for (int64_t r = 0; r < kRows; r += kLanes) {
      const V before = Isa::load(a.peak + r), after = maximum(before, Isa::load(a.fresh + r));
      Isa::store(a.peak + r, after);
      // A row that has seen nothing yet subtracts 0 instead of minus infinity from itself.
      const V base = after == splat<V>(kNegInf) ? splat<V>(0.0f) : after;
      Isa::store(a.fresh + r, base);
      Isa::store(a.decay + r, exp2_lanes(before - base));
    }
    for (int64_t r = 0; r < row_count; ++r) {
      float* row = a.scores + r * kCols;
      const float base = a.fresh[r];
      V total = splat<V>(0.0f);
      for (int j = 0; j < kVectors * n; ++j) {
        const V w = exp2_lanes(Isa::load(row + kLanes * j) - base);
        Isa::store(row + kLanes * j, w);
        total += w;
      }
      a.sum[r] = a.sum[r] * a.decay[r] + Isa::sum(total);
    }
    weighted_rows<Isa, true>(a.scores, values, n, s.strips, row_count, a.decay, a.acc);
  }
  for (int64_t r = 0; r < a.count; ++r) {
    a.lse[r] = (a.peak[r] + std::log2(a.sum[r])) * kLn2;
    a.inverse[r] = 1.0f / a.sum[r];
  }
}

// The same queries backward. The caller fills in q, grad_out, delta (the sum over d of out * grad_out), lse (base 2)
// and the panels; it takes grad_q. grad_k and grad_v [seen panels][panel_size] are added to; slot: panel -> its place.
struct BackwardTile {
  const Shape& s;
  const Visibility& vis;
  int64_t first, count;
  const float *k_transposed, *v_transposed, *k_rows;
  float *grad_k, *grad_v;
  const int32_t* slot;
  float *q, *grad_out, *grad_q, *weights, *grad_scores, *lse, *delta;

  static int64_t scratch(const Shape& s) { return 3 * kRows * s.padded() + 2 * kRows * kCols + 2 * kRows; }

  BackwardTile(const Shape& shape, const Visibility& visibility, int64_t first_, int64_t count_, float* scratch)
      : s(shape), vis(visibility), first(first_), count(count_) {
    const int64_t size = kRows * s.padded();
    q = scratch;
    grad_out = q + size;
    grad_q = grad_out + size;
    weights = grad_q + size;
    grad_scores = weights + kRows * kCols;
    lse = grad_scores + kRows * kCols;
    delta = lse + kRows;
  }
};

template <class Isa>
AXPO_INLINE void backward_sweep(const BackwardTile& a) {
  using V = typename Isa::V;
  constexpr int kLanes = Isa::kLanes, kVectors = kPanel / kLanes;
  const Shape& s = a.s;
  const int64_t last = a.first + a.count - 1;
  const int64_t row_count = (a.count + Isa::kBlock - 1) / Isa::kBlock * Isa::kBlock;
  std::fill_n(a.grad_q, kRows * s.padded(), 0.0f);
  // Rows behind the last query stay in the products over the rows: they must be zeros.
  std::fill_n(a.weights, 2 * kRows * kCols, 0.0f);

  int64_t panels[kGroup];
  const float* of_panels[kGroup];
  for (int64_t p = 0;;) {
    const int64_t n = next_panels(a.vis, a.first, last / kPanel + 1, p, panels);
    if (n == 0) break;
    addresses(a.k_transposed, s.panel_size(), panels, n, of_panels);
    row_products<Isa>(a.q, of_panels, n, s.strips, row_count, a.weights);
    addresses(a.v_transposed, s.panel_size(), panels, n, of_panels);
    row_products<Isa>(a.grad_out, of_panels, n, s.strips, row_count, a.grad_scores);
    mask_panels(a.vis, panels, n, a.first, last, row_count, a.weights);

    for (int64_t r = 0; r < row_count; ++r) {
      const float base = a.lse[r], shift = a.delta[r];
      for (int j = 0; j < kVectors * n; ++j) {
        float *w = a.weights + r * kCols + kLanes * j, *g = a.grad_scores + r * kCols + kLanes * j;
        // The saved lse is rounded, so the difference may come out a little above 0: exp2_lanes takes that.
        const V weight = exp2_lanes(Isa::load(w) - base);
        Isa::store(w, weight);
        Isa::store(g, weight * (Isa::load(g) - shift));
      }
    }
    addresses(a.k_rows, s.panel_size(), panels, n, of_panels);
    weighted_rows<Isa, false>(a.grad_scores, of_panels, n, s.strips, row_count, nullptr, a.grad_q);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = a.slot[panels[i]] * s.panel_size();
      add_columns_of_panel<Isa>(a.weights + i * kPanel, a.grad_out, s.strips, a.grad_v + at);
      add_columns_of_panel<Isa>(a.grad_scores + i * kPanel, a.q, s.strips, a.grad_k + at);
    }
  }
}

AXPO_CLONES void forward_narrow(const ForwardTile& a) { forward_sweep<Narrow>(a); }
AXPO_CLONES void backward_narrow(const BackwardTile& a) { backward_sweep<Narrow>(a); }
AXPO_WIDE void forward_wide(const ForwardTile& a) { forward_sweep<Wide>(a); }
AXPO_WIDE void backward_wide(const BackwardTile& a) { backward_sweep<Wide>(a); }

}  // namespace

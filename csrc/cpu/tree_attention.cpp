// Tree attention, forward and backward, fp32. See kernels/tree_attention.py for what it computes.
//
// Work is cut into tiles of kRows queries and panels of 16 keys. For each query tile only the panels that some query of
// it can see are visited, four at a time, and only panels on a boundary (the diagonal, the end of a subtree) take the
// path with a mask. Scores are kept in base 2: log2(e) is folded into the scaled queries.
//
// The backward pass makes one sweep (five products a pair of tiles, where separate passes for dQ and for dK, dV need
// seven) without atomics: an item is (KV head, one of at most kChunks ranges of queries); it owns the dQ of its queries
// and a private partial dK and dV of the panels they see, and the partials are added in the order of the ranges. The
// ranges depend on T alone, so the result does not depend on the threads.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "tree_tile.h"

namespace {

constexpr int64_t kChunks = 4;  // query ranges of the backward pass

Visibility visibility(const at::Tensor& subtree_end, const Shape& s) {
  Visibility vis{std::vector<int32_t>(s.panels * kPanel, 0), std::vector<int32_t>(s.panels, 0),
                 std::vector<int32_t>(s.panels, 0)};
  const at::Tensor ends = subtree_end.to(at::kLong).contiguous();
  const int64_t* data = ends.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < s.tokens; ++t) {
    TORCH_CHECK_VALUE(data[t] > t && data[t] <= s.tokens, "tree_attention: subtree_end[", t, "] = ", data[t],
                      " must lie in ", t + 1, " .. ", s.tokens);
    vis.end[t] = static_cast<int32_t>(data[t]);
  }
  for (int64_t p = 0; p < s.panels; ++p) {
    const int32_t* e = vis.end.data() + p * kPanel;
    vis.latest[p] = *std::max_element(e, e + kPanel);
    vis.earliest[p] = *std::min_element(e, e + kPanel);
  }
  return vis;
}

// K or V of every KV head as panels [Hk][panels][padded D * 16].
Buffer pack_panels(const at::Tensor& x, const Shape& s, bool transposed) {
  Buffer out = buffer(s.kv_heads * s.panels * s.panel_size());
  const float* data = x.const_data_ptr<float>();
  const int64_t stride = s.kv_heads * s.dim;
  at::parallel_for(0, s.kv_heads * s.panels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / s.panels, first = i % s.panels * kPanel;
      const int64_t count = std::min<int64_t>(kPanel, s.tokens - first);
      const float* from = data + first * stride + head * s.dim;
      float* to = out.get() + i * s.panel_size();
      if (transposed) {
        pack_transposed(from, stride, count, s.dim, to);
      } else {
        pack_rows(from, stride, count, kPanel, s.dim, 1.0f, to);
      }
    }
  });
  return out;
}

// ---- forward ----

struct Forward {
  Shape s;
  const Visibility* vis;
  const float *k_panels, *v_panels;  // of the KV head: K transposed, V as rows
  const float* q;                    // first query of the tile, at the head
  float *out, *lse;                  // likewise
  int64_t first;                     // packed index of the first query
  float scale;
};

int64_t forward_scratch(const Shape& s) { return 2 * kRows * s.padded() + kRows * kCols + 4 * kRows; }

AXPO_CLONES void forward_tile(const Forward& a, float* scratch) {
  const Shape& s = a.s;
  const int64_t count = std::min<int64_t>(kRows, s.tokens - a.first), last = a.first + count - 1;
  const int64_t row_count = (count + kBlock - 1) / kBlock * kBlock;
  float* q = scratch;
  float* acc = q + kRows * s.padded();
  float* scores = acc + kRows * s.padded();
  float* peak = scores + kRows * kCols;  // running maximum, sum and decay of each row
  float* sum = peak + kRows;
  float* decay = sum + kRows;
  float* fresh = decay + kRows;

  pack_rows(a.q, s.q_heads * s.dim, count, kRows, s.dim, a.scale * kLog2e, q);
  std::fill_n(acc, kRows * s.padded(), 0.0f);
  std::fill_n(peak, kRows, kNegInf);
  std::fill_n(sum, kRows, 0.0f);

  const int64_t panel_end = last / kPanel + 1;
  for (int64_t p = 0; p < panel_end;) {
    const float* values[kGroup];
    int n = 0;
    for (; p < panel_end && n < kGroup; ++p) {
      if (!a.vis->seen(p, a.first)) continue;
      row_products(q, a.k_panels + p * s.panel_size(), s.strips, row_count, scores + n * kPanel);
      if (!a.vis->full(p, a.first, last)) {
        mask_panel(a.vis->end.data() + p * kPanel, p * kPanel, a.first, row_count, scores + n * kPanel);
      }
      values[n++] = a.v_panels + p * s.panel_size();
    }
    if (n == 0) break;

    for (int64_t r = 0; r < row_count; ++r) {
      f32x8 m = load8(scores + r * kCols);
      for (int j = 1; j < 2 * n; ++j) m = max8(m, load8(scores + r * kCols + 8 * j));
      fresh[r] = hmax8(m);
    }
    for (int64_t r = 0; r < kRows; r += 8) {
      const f32x8 before = load8(peak + r), after = max8(before, load8(fresh + r));
      store8(peak + r, after);
      // A row that has seen nothing yet subtracts 0 instead of minus infinity from itself.
      const f32x8 base = after == splat8(kNegInf) ? splat8(0.0f) : after;
      store8(fresh + r, base);
      store8(decay + r, exp2_8(before - base));
    }
    for (int64_t r = 0; r < row_count; ++r) {
      const f32x8 base = splat8(fresh[r]);
      f32x8 total = splat8(0.0f);
      for (int j = 0; j < 2 * n; ++j) {
        float* at = scores + r * kCols + 8 * j;
        const f32x8 w = exp2_8(load8(at) - base);
        store8(at, w);
        total += w;
      }
      sum[r] = sum[r] * decay[r] + sum8(total);
    }
    weighted_rows<true>(scores, values, n, s.strips, row_count, decay, acc);
  }

  for (int64_t r = 0; r < count; ++r) {
    a.lse[r] = (peak[r] + std::log2(sum[r])) * kLn2;
    const f32x8 inverse = splat8(1.0f / sum[r]);
    for (int64_t d = 0; d < s.dim; d += 8) {
      const float* from = acc + (d / kStrip * kRows + r) * kStrip + d % kStrip;
      store8(a.out + r * s.q_heads * s.dim + d, load8(from) * inverse);
    }
  }
}

// ---- backward ----

struct Backward {
  Shape s;
  const Visibility* vis;
  const float *k_transposed, *v_transposed, *k_rows;  // panels of the KV head
  const float *q, *out, *grad_out, *lse;              // first query of the tile, at the head
  float* grad_q;                                      // likewise
  float *grad_k, *grad_v;                             // partials [seen panels][panel_size]
  const int32_t* slot;                                // panel -> its place in the partials
  int64_t first;
  float scale;
};

int64_t backward_scratch(const Shape& s) { return 3 * kRows * s.padded() + 2 * kRows * kCols + 2 * kRows; }

AXPO_CLONES void backward_tile(const Backward& a, float* scratch) {
  const Shape& s = a.s;
  const int64_t count = std::min<int64_t>(kRows, s.tokens - a.first), last = a.first + count - 1;
  const int64_t row_count = (count + kBlock - 1) / kBlock * kBlock;
  float* q = scratch;
  float* grad_out = q + kRows * s.padded();
  float* grad_q = grad_out + kRows * s.padded();
  float* weights = grad_q + kRows * s.padded();
  float* grad_scores = weights + kRows * kCols;
  float* lse = grad_scores + kRows * kCols;  // base 2
  float* delta = lse + kRows;                // sum over d of out * grad_out

  const int64_t stride = s.q_heads * s.dim;
  pack_rows(a.q, stride, count, kRows, s.dim, a.scale * kLog2e, q);
  pack_rows(a.grad_out, stride, count, kRows, s.dim, 1.0f, grad_out);
  std::fill_n(grad_q, kRows * s.padded(), 0.0f);
  // Rows behind the last query stay in the products over the rows: they must be zeros.
  std::fill_n(weights, 2 * kRows * kCols, 0.0f);
  for (int64_t r = 0; r < kRows; ++r) {
    f32x8 total = splat8(0.0f);
    for (int64_t d = 0; r < count && d < s.dim; d += 8) {
      total += load8(a.out + r * stride + d) * load8(a.grad_out + r * stride + d);
    }
    delta[r] = sum8(total);
    lse[r] = r < count ? a.lse[r] * kLog2e : 0.0f;
  }

  const int64_t panel_end = last / kPanel + 1;
  for (int64_t p = 0; p < panel_end;) {
    const float* keys[kGroup];
    int64_t slots[kGroup];
    int n = 0;
    for (; p < panel_end && n < kGroup; ++p) {
      if (!a.vis->seen(p, a.first)) continue;
      row_products(q, a.k_transposed + p * s.panel_size(), s.strips, row_count, weights + n * kPanel);
      row_products(grad_out, a.v_transposed + p * s.panel_size(), s.strips, row_count, grad_scores + n * kPanel);
      if (!a.vis->full(p, a.first, last)) {
        mask_panel(a.vis->end.data() + p * kPanel, p * kPanel, a.first, row_count, weights + n * kPanel);
      }
      slots[n] = a.slot[p];
      keys[n++] = a.k_rows + p * s.panel_size();
    }
    if (n == 0) break;

    for (int64_t r = 0; r < row_count; ++r) {
      const f32x8 base = splat8(lse[r]), shift = splat8(delta[r]);
      for (int j = 0; j < 2 * n; ++j) {
        float *w = weights + r * kCols + 8 * j, *g = grad_scores + r * kCols + 8 * j;
        // The saved lse is rounded, so the difference may come out a little above 0: exp2_8 takes that.
        const f32x8 weight = exp2_8(load8(w) - base);
        store8(w, weight);
        store8(g, weight * (load8(g) - shift));
      }
    }
    weighted_rows<false>(grad_scores, keys, n, s.strips, row_count, nullptr, grad_q);
    for (int i = 0; i < n; ++i) {
      add_columns_of_panel(weights + i * kPanel, grad_out, s.strips, a.grad_v + slots[i] * s.panel_size());
      add_columns_of_panel(grad_scores + i * kPanel, q, s.strips, a.grad_k + slots[i] * s.panel_size());
    }
  }

  const f32x8 factor = splat8(a.scale);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t d = 0; d < s.dim; d += 8) {
      const float* from = grad_q + (d / kStrip * kRows + r) * kStrip + d % kStrip;
      store8(a.grad_q + r * stride + d, load8(from) * factor);
    }
  }
}

// One range of queries and the panels that some of them see.
struct Chunk {
  int64_t first_tile, tile_end;
  std::vector<int32_t> slot;  // [panels] place among the seen panels, or -1
  int64_t seen = 0;
  Buffer grad_k, grad_v;  // [Hk][seen][panel_size]
};

std::vector<Chunk> make_chunks(const Shape& s, const Visibility& vis) {
  const int64_t tiles = std::max<int64_t>(5, (s.tiles + kChunks - 1) / kChunks);
  std::vector<Chunk> chunks;
  for (int64_t tile = 0; tile < s.tiles; tile += tiles) {
    Chunk c{tile, std::min(s.tiles, tile + tiles), std::vector<int32_t>(s.panels, -1)};
    const int64_t panel_end = (std::min(s.tokens, c.tile_end * kRows) + kPanel - 1) / kPanel;
    for (int64_t p = 0; p < panel_end; ++p) {
      if (vis.seen(p, tile * kRows)) c.slot[p] = static_cast<int32_t>(c.seen++);
    }
    c.grad_k = buffer(s.kv_heads * c.seen * s.panel_size());
    c.grad_v = buffer(s.kv_heads * c.seen * s.panel_size());
    chunks.push_back(std::move(c));
  }
  return chunks;
}

// grad [T, Hk, D] at one head and panel = factor * the chunks' partials, added in the order of the chunks.
AXPO_CLONES void add_partials(const Shape& s, const float* const* partials, int64_t partial_count, int64_t rows,
                              float factor, float* grad) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < s.dim; d += 8) {
      const int64_t at = (d / kStrip * kPanel + r) * kStrip + d % kStrip;
      f32x8 total = splat8(0.0f);
      for (int64_t i = 0; i < partial_count; ++i) total += load8(partials[i] + at);
      store8(grad + r * s.kv_heads * s.dim + d, total * splat8(factor));
    }
  }
}

// ---- operators ----

Shape shape_of(const at::Tensor& q, const at::Tensor& k) {
  Shape s{};
  s.tokens = q.size(0);
  s.q_heads = q.size(1);
  s.kv_heads = k.size(1);
  s.dim = q.size(2);
  s.strips = strips(s.dim);
  s.panels = (s.tokens + kPanel - 1) / kPanel;
  s.tiles = (s.tokens + kRows - 1) / kRows;
  TORCH_CHECK_VALUE(s.dim % 8 == 0 && s.dim <= kMaxDim, "tree_attention: D = ", s.dim,
                    " must be a multiple of 8 up to ", kMaxDim);
  TORCH_CHECK_VALUE(s.tokens < std::numeric_limits<int32_t>::max(), "tree_attention: too many tokens: ", s.tokens);
  return s;
}

std::tuple<at::Tensor, at::Tensor> tree_attention(const at::Tensor& q_in, const at::Tensor& k_in,
                                                  const at::Tensor& v_in, const at::Tensor& subtree_end,
                                                  double scale) {
  const at::Tensor q = q_in.contiguous(), k = k_in.contiguous(), v = v_in.contiguous();
  const Shape s = shape_of(q, k);
  at::Tensor out = at::empty(q.sizes(), q.options());
  at::Tensor lse = at::empty({s.q_heads, s.tokens}, q.options());
  if (s.tokens == 0 || s.dim == 0) return {out, lse};
  const Visibility vis = visibility(subtree_end, s);
  const Buffer k_panels = pack_panels(k, s, true), v_panels = pack_panels(v, s, false);
  const float* q_data = q.const_data_ptr<float>();
  float *out_data = out.mutable_data_ptr<float>(), *lse_data = lse.mutable_data_ptr<float>();

  parallel_items(s.tiles * s.q_heads, forward_scratch(s), [&](int64_t item, float* scratch) {
    const int64_t tile = s.tiles - 1 - item / s.q_heads, head = item % s.q_heads;
    const int64_t kv_offset = head / s.group() * s.panels * s.panel_size(), first = tile * kRows;
    const int64_t offset = (first * s.q_heads + head) * s.dim;
    forward_tile({s, &vis, k_panels.get() + kv_offset, v_panels.get() + kv_offset, q_data + offset, out_data + offset,
                  lse_data + head * s.tokens + first, first, static_cast<float>(scale)},
                 scratch);
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> tree_attention_backward(
    const at::Tensor& grad_out_in, const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
    const at::Tensor& subtree_end, const at::Tensor& out_in, const at::Tensor& lse_in, double scale) {
  const at::Tensor q = q_in.contiguous(), k = k_in.contiguous(), v = v_in.contiguous();
  const at::Tensor grad_out = grad_out_in.contiguous(), out = out_in.contiguous(), lse = lse_in.contiguous();
  const Shape s = shape_of(q, k);
  at::Tensor grad_q = at::empty(q.sizes(), q.options());
  at::Tensor grad_k = at::empty(k.sizes(), k.options()), grad_v = at::empty(v.sizes(), v.options());
  if (s.tokens == 0 || s.dim == 0) return {grad_q, grad_k, grad_v};
  const Visibility vis = visibility(subtree_end, s);
  const Buffer k_transposed = pack_panels(k, s, true), v_transposed = pack_panels(v, s, true);
  const Buffer k_rows = pack_panels(k, s, false);
  std::vector<Chunk> chunks = make_chunks(s, vis);
  const int64_t chunk_count = static_cast<int64_t>(chunks.size());
  const float *q_data = q.const_data_ptr<float>(), *out_data = out.const_data_ptr<float>();
  const float *grad_data = grad_out.const_data_ptr<float>(), *lse_data = lse.const_data_ptr<float>();
  float* grad_q_data = grad_q.mutable_data_ptr<float>();

  parallel_items(chunk_count * s.kv_heads, backward_scratch(s), [&](int64_t item, float* scratch) {
    Chunk& chunk = chunks[chunk_count - 1 - item / s.kv_heads];
    const int64_t kv_head = item % s.kv_heads, kv_offset = kv_head * s.panels * s.panel_size();
    const int64_t size = chunk.seen * s.panel_size();
    float *partial_k = chunk.grad_k.get() + kv_head * size, *partial_v = chunk.grad_v.get() + kv_head * size;
    std::fill_n(partial_k, size, 0.0f);
    std::fill_n(partial_v, size, 0.0f);
    for (int64_t tile = chunk.first_tile; tile < chunk.tile_end; ++tile) {
      for (int64_t head = kv_head * s.group(); head < (kv_head + 1) * s.group(); ++head) {
        const int64_t first = tile * kRows, offset = (first * s.q_heads + head) * s.dim;
        backward_tile({s, &vis, k_transposed.get() + kv_offset, v_transposed.get() + kv_offset,
                       k_rows.get() + kv_offset, q_data + offset, out_data + offset, grad_data + offset,
                       lse_data + head * s.tokens + first, grad_q_data + offset, partial_k, partial_v,
                       chunk.slot.data(), first, static_cast<float>(scale)},
                      scratch);
      }
    }
  });

  float *grad_k_data = grad_k.mutable_data_ptr<float>(), *grad_v_data = grad_v.mutable_data_ptr<float>();
  at::parallel_for(0, s.kv_heads * s.panels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / s.panels, panel = i % s.panels, first = panel * kPanel;
      const int64_t rows = std::min<int64_t>(kPanel, s.tokens - first), offset = (first * s.kv_heads + head) * s.dim;
      std::array<const float*, kChunks> of_k, of_v;
      int64_t n = 0;
      for (const Chunk& c : chunks) {
        if (c.slot[panel] < 0) continue;
        const int64_t at = (head * c.seen + c.slot[panel]) * s.panel_size();
        of_k[n] = c.grad_k.get() + at;
        of_v[n++] = c.grad_v.get() + at;
      }
      // The queries were packed times scale * log2(e).
      add_partials(s, of_k.data(), n, rows, kLn2, grad_k_data + offset);
      add_partials(s, of_v.data(), n, rows, 1.0f, grad_v_data + offset);
    }
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def("tree_attention(Tensor q, Tensor k, Tensor v, Tensor subtree_end, float scale) -> (Tensor out, Tensor lse)");
  m.impl("tree_attention", c10::DispatchKey::CPU, TORCH_FN(tree_attention));
  m.def(
      "tree_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor subtree_end, Tensor out, "
      "Tensor lse, float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.impl("tree_attention_backward", c10::DispatchKey::CPU, TORCH_FN(tree_attention_backward));
}

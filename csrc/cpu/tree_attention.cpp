// Tree attention, forward and backward, in fp32 arithmetic on fp32 or bf16 tensors. See kernels/tree_attention for what
// it computes.
//
// Work is cut into tiles of kRows queries and panels of 16 keys. For each query tile only the panels that some query of
// it can see are visited, kGroup at a time, and only panels on a boundary (the diagonal, the end of a subtree) take the
// path with a mask. Scores are kept in base 2: log2(e) is folded into the scaled queries. The tile code is compiled
// for vectors of 512 and of 256 bits (tree_vector.h), and the processor decides.
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

#include "tree_sweep.h"

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

// K or V of every KV head as panels [Hk][panels][padded D * 16], as rows, transposed or both.
struct Panels {
  Buffer rows, transposed;
};

template <class T>
Panels pack_panels(const at::Tensor& x, const Shape& s, bool with_rows, bool with_transposed) {
  const int64_t total = s.kv_heads * s.panels * s.panel_size(), stride = s.kv_heads * s.dim;
  Panels out{with_rows ? buffer(total) : nullptr, with_transposed ? buffer(total) : nullptr};
  const T* data = x.const_data_ptr<T>();
  at::parallel_for(0, s.kv_heads * s.panels, 16, [&](int64_t begin, int64_t end) {
    const Buffer scratch = buffer(s.panel_size());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / s.panels, first = i % s.panels * kPanel;
      const int64_t count = std::min<int64_t>(kPanel, s.tokens - first);
      float* rows = with_rows ? out.rows.get() + i * s.panel_size() : scratch.get();
      pack_rows(data + first * stride + head * s.dim, stride, count, kPanel, s.dim, 1.0f, rows);
      if (with_transposed) transpose_panel(rows, s.strips, out.transposed.get() + i * s.panel_size());
    }
  });
  return out;
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
template <class T>
AXPO_INLINE void add_partials_of(const Shape& s, const float* const* partials, int64_t partial_count, int64_t rows,
                                 float factor, T* grad) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < s.dim; d += 8) {
      const int64_t at = (d / kStrip * kPanel + r) * kStrip + d % kStrip;
      f32x8 total = splat8(0.0f);
      for (int64_t i = 0; i < partial_count; ++i) total += load8(partials[i] + at);
      store_row8(grad + r * s.kv_heads * s.dim + d, total * splat8(factor));
    }
  }
}
AXPO_CLONES void add_partials(const Shape& s, const float* const* partials, int64_t n, int64_t rows, float factor,
                              float* grad) {
  add_partials_of(s, partials, n, rows, factor, grad);
}
AXPO_CLONES void add_partials(const Shape& s, const float* const* partials, int64_t n, int64_t rows, float factor,
                              bf16* grad) {
  add_partials_of(s, partials, n, rows, factor, grad);
}

// ---- operators ----

Shape shape_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
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
  TORCH_CHECK_VALUE((q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16) &&
                        k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                    "tree_attention: q, k and v must all be float32 or all bfloat16");
  TORCH_CHECK_VALUE(s.tokens < std::numeric_limits<int32_t>::max(), "tree_attention: too many tokens: ", s.tokens);
  return s;
}

template <class T>
void forward(const Shape& s, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
             const at::Tensor& subtree_end, float scale, at::Tensor& out, at::Tensor& lse) {
  const Visibility vis = visibility(subtree_end, s);
  const Panels keys = pack_panels<T>(k, s, false, true), values = pack_panels<T>(v, s, true, false);
  const T* q_data = q.const_data_ptr<T>();
  T* out_data = out.mutable_data_ptr<T>();
  float* lse_data = lse.mutable_data_ptr<float>();
  const int64_t stride = s.q_heads * s.dim;

  parallel_items(s.tiles * s.q_heads, ForwardTile::scratch(s), [&](int64_t item, float* scratch) {
    const int64_t tile = s.tiles - 1 - item / s.q_heads, head = item % s.q_heads;
    const int64_t kv_offset = head / s.group() * s.panels * s.panel_size(), first = tile * kRows;
    const int64_t offset = (first * s.q_heads + head) * s.dim, count = std::min<int64_t>(kRows, s.tokens - first);
    ForwardTile a(s, vis, first, count, scratch);
    a.k_transposed = keys.transposed.get() + kv_offset;
    a.v_rows = values.rows.get() + kv_offset;
    pack_rows(q_data + offset, stride, count, kRows, s.dim, scale * kLog2e, a.q);
    (has_wide_vectors() ? forward_wide : forward_narrow)(a);
    unpack_rows(a.acc, a.inverse, count, s.dim, stride, out_data + offset);
    std::copy_n(a.lse, count, lse_data + head * s.tokens + first);
  });
}

std::tuple<at::Tensor, at::Tensor> tree_attention(const at::Tensor& q_in, const at::Tensor& k_in,
                                                  const at::Tensor& v_in, const at::Tensor& subtree_end,
                                                  double scale) {
  const at::Tensor q = q_in.contiguous(), k = k_in.contiguous(), v = v_in.contiguous();
  const Shape s = shape_of(q, k, v);
  at::Tensor out = at::empty(q.sizes(), q.options());
  at::Tensor lse = at::empty({s.q_heads, s.tokens}, q.options().dtype(at::kFloat));
  if (s.tokens == 0 || s.dim == 0) return {out, lse};
  const auto run = q.scalar_type() == at::kFloat ? forward<float> : forward<bf16>;
  run(s, q, k, v, subtree_end, static_cast<float>(scale), out, lse);
  return {out, lse};
}

// The tensors of the backward pass.
struct Operands {
  const at::Tensor &grad_out, &q, &k, &v, &subtree_end, &out, &lse;
  at::Tensor &grad_q, &grad_k, &grad_v;
};

template <class T>
void backward(const Shape& s, const Operands& o, float scale) {
  const Visibility vis = visibility(o.subtree_end, s);
  const Panels keys = pack_panels<T>(o.k, s, true, true), values = pack_panels<T>(o.v, s, false, true);
  std::vector<Chunk> chunks = make_chunks(s, vis);
  const int64_t chunk_count = static_cast<int64_t>(chunks.size()), stride = s.q_heads * s.dim;
  const T *q_data = o.q.const_data_ptr<T>(), *out_data = o.out.const_data_ptr<T>();
  const T* grad_data = o.grad_out.const_data_ptr<T>();
  const float* lse_data = o.lse.const_data_ptr<float>();
  T* grad_q_data = o.grad_q.mutable_data_ptr<T>();
  std::array<float, kRows> factor;
  factor.fill(scale);

  parallel_items(chunk_count * s.kv_heads, BackwardTile::scratch(s), [&](int64_t item, float* scratch) {
    Chunk& chunk = chunks[chunk_count - 1 - item / s.kv_heads];
    const int64_t kv_head = item % s.kv_heads, kv_offset = kv_head * s.panels * s.panel_size();
    const int64_t size = chunk.seen * s.panel_size();
    float *partial_k = chunk.grad_k.get() + kv_head * size, *partial_v = chunk.grad_v.get() + kv_head * size;
    std::fill_n(partial_k, size, 0.0f);
    std::fill_n(partial_v, size, 0.0f);
    for (int64_t tile = chunk.first_tile; tile < chunk.tile_end; ++tile) {
      for (int64_t head = kv_head * s.group(); head < (kv_head + 1) * s.group(); ++head) {
        const int64_t first = tile * kRows, offset = (first * s.q_heads + head) * s.dim;
        const int64_t count = std::min<int64_t>(kRows, s.tokens - first);
        BackwardTile a(s, vis, first, count, scratch);
        a.k_transposed = keys.transposed.get() + kv_offset;
        a.k_rows = keys.rows.get() + kv_offset;
        a.v_transposed = values.transposed.get() + kv_offset;
        a.grad_k = partial_k;
        a.grad_v = partial_v;
        a.slot = chunk.slot.data();
        pack_rows(q_data + offset, stride, count, kRows, s.dim, scale * kLog2e, a.q);
        pack_rows(grad_data + offset, stride, count, kRows, s.dim, 1.0f, a.grad_out);
        row_dots(out_data + offset, grad_data + offset, stride, count, s.dim, a.delta);
        for (int64_t r = 0; r < kRows; ++r) {
          a.lse[r] = r < count ? lse_data[head * s.tokens + first + r] * kLog2e : 0.0f;
        }
        (has_wide_vectors() ? backward_wide : backward_narrow)(a);
        unpack_rows(a.grad_q, factor.data(), count, s.dim, stride, grad_q_data + offset);
      }
    }
  });

  T *grad_k_data = o.grad_k.mutable_data_ptr<T>(), *grad_v_data = o.grad_v.mutable_data_ptr<T>();
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
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> tree_attention_backward(
    const at::Tensor& grad_out_in, const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
    const at::Tensor& subtree_end, const at::Tensor& out_in, const at::Tensor& lse_in, double scale) {
  const at::Tensor q = q_in.contiguous(), k = k_in.contiguous(), v = v_in.contiguous();
  const at::Tensor grad_out = grad_out_in.to(q.scalar_type()).contiguous(), out = out_in.contiguous();
  const at::Tensor lse = lse_in.contiguous();
  const Shape s = shape_of(q, k, v);
  at::Tensor grad_q = at::empty(q.sizes(), q.options());
  at::Tensor grad_k = at::empty(k.sizes(), k.options()), grad_v = at::empty(v.sizes(), v.options());
  if (s.tokens == 0 || s.dim == 0) return {grad_q, grad_k, grad_v};
  const auto run = q.scalar_type() == at::kFloat ? backward<float> : backward<bf16>;
  run(s, {grad_out, q, k, v, subtree_end, out, lse, grad_q, grad_k, grad_v}, static_cast<float>(scale));
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

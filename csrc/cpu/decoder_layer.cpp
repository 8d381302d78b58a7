// One decoder layer over the paged cache in one call, for inference. See kernels/decoder_layer.py.
//
// It calls the operators that the model calls from Python, in the same order on the same operands, so its bits are the
// model's. What it saves is the way there: some fifteen calls through Python a layer, which outweigh the arithmetic when
// a model or a batch is small. (On a GPU a captured graph does the same.)
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <tuple>

#include "linear.h"

namespace {

using at::Tensor;
using std::optional;
using std::tuple;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor rmsnorm(const Tensor& x, const Tensor& weight, double eps) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, double)>("axpo::rmsnorm");
  return op.call(x, weight, eps);
}

tuple<Tensor, Tensor> add_rmsnorm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  static const auto op =
      find<tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double)>("axpo::add_rmsnorm");
  return op.call(x, residual, weight, eps);
}

tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  static const auto op =
      find<tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool)>("axpo::rotary");
  return op.call(q, k, cos, sin, false);
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&)>("axpo::swiglu");
  return op.call(gate, up);
}

void write_kv(const Tensor& k, const Tensor& v, Tensor& k_cache, Tensor& v_cache, const Tensor& slots) {
  static const auto op = find<void(const Tensor&, const Tensor&, Tensor&, Tensor&, const Tensor&)>("axpo::write_kv");
  op.call(k, v, k_cache, v_cache, slots);
}

Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& tables,
                       const Tensor& cu_seqlens_q, const Tensor& context_lens, double scale, bool share) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                     const Tensor&, double, bool)>("axpo::paged_attention");
  return op.call(q, k_cache, v_cache, tables, cu_seqlens_q, context_lens, scale, share);
}

tuple<Tensor, Tensor> decoder_layer(const Tensor& x_in, const Tensor& residual_in, const Tensor& cos, const Tensor& sin,
                                    at::TensorList weights, const optional<Tensor>& qkv_bias,
                                    const optional<Tensor>& o_bias, Tensor& k_cache, Tensor& v_cache,
                                    const Tensor& slots, const optional<Tensor>& writes, const Tensor& tables,
                                    const Tensor& cu_seqlens_q, const Tensor& context_lens, double eps, double scale,
                                    bool share) {
  TORCH_CHECK_VALUE(weights.size() == 8, "decoder_layer: ", weights.size(), " weights: it takes input norm, qkv, ",
                    "q norm, k norm, o, post-attention norm, gate and up, down");
  const Tensor &qkv_weight = weights[1], &gate_up_weight = weights[6];
  const int64_t tokens = x_in.size(0), dim = k_cache.size(3), kv_heads = k_cache.size(1);
  const int64_t q_heads = qkv_weight.size(0) / dim - 2 * kv_heads;

  auto [x, residual] = add_rmsnorm(x_in, residual_in, weights[0], eps);
  const auto qkv = axpo::linear(x, qkv_weight, qkv_bias, false).view({tokens, -1, dim});
  const Tensor q_raw = qkv.narrow(1, 0, q_heads), k_raw = qkv.narrow(1, q_heads, kv_heads);
  const Tensor v = qkv.narrow(1, q_heads + kv_heads, kv_heads);
  const auto [q, k] = rotary(rmsnorm(q_raw, weights[2], eps), rmsnorm(k_raw, weights[3], eps), cos, sin);
  if (writes) {
    write_kv(k.index_select(0, *writes), v.index_select(0, *writes), k_cache, v_cache, slots);
  } else {
    write_kv(k, v, k_cache, v_cache, slots);
  }
  const Tensor attended = paged_attention(q, k_cache, v_cache, tables, cu_seqlens_q, context_lens, scale, share);
  const Tensor mixed = axpo::linear(attended.view({tokens, -1}), weights[4], o_bias, false);
  auto [y, sum] = add_rmsnorm(mixed, residual, weights[5], eps);
  const Tensor gate_up = axpo::linear(y, gate_up_weight, std::nullopt, false);
  const int64_t half = gate_up_weight.size(0) / 2;
  const Tensor gated = swiglu(gate_up.narrow(1, 0, half), gate_up.narrow(1, half, half));
  return {axpo::linear(gated, weights[7], std::nullopt, false), sum};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def(
      "decoder_layer(Tensor x, Tensor residual, Tensor cos, Tensor sin, Tensor[] weights, Tensor? qkv_bias, "
      "Tensor? o_bias, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor? writes, Tensor tables, "
      "Tensor cu_seqlens_q, Tensor context_lens, float eps, float scale, bool share=True) -> (Tensor, Tensor)");
  m.impl("decoder_layer", c10::DispatchKey::CPU, TORCH_FN(decoder_layer));
}

// Rotary position embedding of queries and keys in one call, and its inverse (the backward). See kernels/rotary.py.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "rows.h"

namespace {
using namespace axpo;
using at::Tensor;
using std::tuple;

AXPO_CLONES void rotate_row(const float* x, const float* cos, const float* sin, float* y, int64_t half) {
  const float* x2 = x + half;
  float* y2 = y + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x2[i];
    y[i] = a * cos[i] - b * sin[i];
    y2[i] = b * cos[i] + a * sin[i];
  }
}

AXPO_CLONES void rotate_row_back(const float* x, const float* cos, const float* sin, float* y, int64_t half) {
  const float* x2 = x + half;
  float* y2 = y + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x2[i];
    y[i] = a * cos[i] + b * sin[i];
    y2[i] = b * cos[i] - a * sin[i];
  }
}

void check(const char* name, const Tensor& x, const Tensor& cos, const Tensor& sin) {
  TORCH_CHECK_VALUE(x.dim() == 3 && cos.dim() == 2 && cos.sizes() == sin.sizes() && cos.size(0) == x.size(0) &&
                        2 * cos.size(1) == x.size(2),
                    "rotary: ", name, " has shape ", x.sizes(), " with cos ", cos.sizes(), " and sin ", sin.sizes(),
                    ": they must be [T, heads, D], [T, D/2] and [T, D/2]");
}

tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool inverse) {
  check("q", q, cos, sin);
  check("k", k, cos, sin);
  Tensor q_out = at::empty(q.sizes(), q.options()), k_out = at::empty(k.sizes(), k.options());
  const int64_t tokens = q.size(0), q_heads = q.size(1), k_heads = k.size(1), dim = q.size(2), half = dim / 2;
  if (tokens == 0 || dim == 0) return {q_out, k_out};
  const Tensor cos_dense = cos.contiguous(), sin_dense = sin.contiguous();
  const float *c = cos_dense.const_data_ptr<float>(), *s = sin_dense.const_data_ptr<float>();
  const auto rotate = inverse ? rotate_row_back : rotate_row;
  by_dtype(q, [&]<class T>(T) {
    const Rows<T> q_in = rows_of<T>(q), k_in = rows_of<T>(k);
    T *q_to = q_out.mutable_data_ptr<T>(), *k_to = k_out.mutable_data_ptr<T>();
    at::parallel_for(0, tokens, grain_rows((q_heads + k_heads) * dim), [&](int64_t begin, int64_t end) {
      FloatRow from, to;
      const auto head = [&](const T* x, T* y, int64_t t) {
        rotate(from.read(x, dim), c + t * half, s + t * half, to.begin(y, dim), half);
        to.finish(y, dim);
      };
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t r = t * q_heads; r < (t + 1) * q_heads; ++r) head(q_in[r], q_to + r * dim, t);
        for (int64_t r = t * k_heads; r < (t + 1) * k_heads; ++r) head(k_in[r], k_to + r * dim, t);
      }
    });
  });
  return {q_out, k_out};
}

// --- autograd --------------------------------------------------------------------------------------------------------

const auto& rotary_op() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("axpo::rotary", "").typed<decltype(rotary)>();
  return op;
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The rotation is orthogonal: its gradient is the rotation by the opposite angle. cos and sin get no gradient.
struct RotaryFunction : torch::autograd::Function<RotaryFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& cos,
                               const Tensor& sin, bool inverse) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["inverse"] = inverse;
    auto [q_out, k_out] = rotary_op().call(q, k, cos, sin, inverse);
    return {q_out, k_out};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto [dq, dk] = rotary_op().call(grads[0], grads[1], saved[0], saved[1], !ctx->saved_data["inverse"].toBool());
    return {dq, dk, Tensor(), Tensor(), Tensor()};
  }
};

tuple<Tensor, Tensor> rotary_autograd(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                      bool inverse) {
  if (needs_autograd(q, k)) {
    const variable_list out = RotaryFunction::apply(q, k, cos, sin, inverse);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return rotary_op().call(q, k, cos, sin, inverse);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse=False) -> (Tensor, Tensor)");
  m.impl("rotary", c10::DispatchKey::CPU, TORCH_FN(rotary));
  m.impl("rotary", c10::DispatchKey::Autograd, TORCH_FN(rotary_autograd));
}

// SwiGLU: silu(gate) * up, forward and backward. See kernels/swiglu.py.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "rows.h"

namespace {
using namespace axpo;
using at::Tensor;
using std::tuple;

static AXPO_INLINE f32x8 sigmoid8(f32x8 x) { return splat8(1.0f) / (splat8(1.0f) + exp8(-x)); }

static AXPO_INLINE void forward8(const float* gate, const float* up, float* y) {
  const f32x8 g = load8(gate);
  store8(y, g * sigmoid8(g) * load8(up));
}

// With σ = sigmoid(gate):  dgate = dy up σ (1 + gate (1 − σ)),  dup = dy gate σ.
static AXPO_INLINE void backward8(const float* dy, const float* gate, const float* up, float* dgate, float* dup) {
  const f32x8 d = load8(dy), g = load8(gate), sigma = sigmoid8(g);
  store8(dgate, d * load8(up) * sigma * (splat8(1.0f) + g * (splat8(1.0f) - sigma)));
  store8(dup, d * g * sigma);
}

// A row's last, incomplete vector goes through padded copies, so that an element's result never depends on where in
// the row it lies.
AXPO_CLONES void forward_row(const float* gate, const float* up, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) forward8(gate + i, up + i, y + i);
  if (i < n) {
    float g[8] = {}, u[8] = {}, out[8];
    const size_t bytes = (n - i) * sizeof(float);
    std::memcpy(g, gate + i, bytes), std::memcpy(u, up + i, bytes);
    forward8(g, u, out);
    std::memcpy(y + i, out, bytes);
  }
}

AXPO_CLONES void backward_row(const float* dy, const float* gate, const float* up, float* dgate, float* dup,
                              int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) backward8(dy + i, gate + i, up + i, dgate + i, dup + i);
  if (i < n) {
    float d[8] = {}, g[8] = {}, u[8] = {}, dg[8], du[8];
    const size_t bytes = (n - i) * sizeof(float);
    std::memcpy(d, dy + i, bytes), std::memcpy(g, gate + i, bytes), std::memcpy(u, up + i, bytes);
    backward8(d, g, u, dg, du);
    std::memcpy(dgate + i, dg, bytes), std::memcpy(dup + i, du, bytes);
  }
}

void check(const Tensor& gate, const Tensor& up) {
  TORCH_CHECK_VALUE(gate.dim() >= 1 && gate.sizes() == up.sizes(), "swiglu: gate has shape ", gate.sizes(),
                    ", but up has ", up.sizes(), ": they must agree");
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  check(gate, up);
  Tensor y = at::empty(gate.sizes(), gate.options());
  by_dtype(gate, [&]<class T>(T) {
    const int64_t n = gate.size(-1);
    const Rows<T> g = rows_of<T>(gate), u = rows_of<T>(up);
    T* out = y.mutable_data_ptr<T>();
    at::parallel_for(0, g.rows, grain_rows(n), [&](int64_t begin, int64_t end) {
      FloatRow a, b, to;
      for (int64_t r = begin; r < end; ++r) {
        forward_row(a.read(g[r], n), b.read(u[r], n), to.begin(out + r * n, n), n);
        to.finish(out + r * n, n);
      }
    });
  });
  return y;
}

tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  Tensor dgate = at::empty(gate.sizes(), gate.options()), dup = at::empty(gate.sizes(), gate.options());
  by_dtype(gate, [&]<class T>(T) {
    const int64_t n = gate.size(-1);
    const Rows<T> d = rows_of<T>(grad), g = rows_of<T>(gate), u = rows_of<T>(up);
    T *gate_out = dgate.mutable_data_ptr<T>(), *up_out = dup.mutable_data_ptr<T>();
    at::parallel_for(0, g.rows, grain_rows(n), [&](int64_t begin, int64_t end) {
      FloatRow a, b, c, to_gate, to_up;
      for (int64_t r = begin; r < end; ++r) {
        backward_row(a.read(d[r], n), b.read(g[r], n), c.read(u[r], n), to_gate.begin(gate_out + r * n, n),
                     to_up.begin(up_out + r * n, n), n);
        to_gate.finish(gate_out + r * n, n);
        to_up.finish(up_out + r * n, n);
      }
    });
  });
  return {dgate, dup};
}

// --- autograd --------------------------------------------------------------------------------------------------------

const auto& swiglu_op() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("axpo::swiglu", "").typed<decltype(swiglu)>();
  return op;
}
const auto& swiglu_backward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("axpo::swiglu_backward", "").typed<decltype(swiglu_backward)>();
  return op;
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct SwigluFunction : torch::autograd::Function<SwigluFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate, const Tensor& up) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({gate, up});
    return swiglu_op().call(gate, up);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto [dgate, dup] = swiglu_backward_op().call(grads[0], saved[0], saved[1]);
    return {dgate, dup};
  }
};

Tensor swiglu_autograd(const Tensor& gate, const Tensor& up) {
  if (needs_autograd(gate, up)) return SwigluFunction::apply(gate, up);
  at::AutoDispatchBelowADInplaceOrView guard;
  return swiglu_op().call(gate, up);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.impl("swiglu", c10::DispatchKey::CPU, TORCH_FN(swiglu));
  m.impl("swiglu", c10::DispatchKey::Autograd, TORCH_FN(swiglu_autograd));
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.impl("swiglu_backward", c10::DispatchKey::CPU, TORCH_FN(swiglu_backward));
}

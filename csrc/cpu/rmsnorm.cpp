// RMSNorm, alone and behind a residual addition, forward and backward. See kernels/rmsnorm.py.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "rows.h"

namespace {
using namespace axpo;
using at::Tensor;
using std::optional;
using std::tuple;

// Rows whose weight gradients are added up in one sequence. Fixed, so that the sum never depends on the threads.
constexpr int64_t kPartition = 128;

AXPO_CLONES float inverse_rms(const float* x, int64_t n, float eps) {
  f32x8 a = splat8(0.0f), b = a;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x8 u = load8(x + i), v = load8(x + i + 8);
    a += u * u, b += v * v;
  }
  float sum = sum8(a + b);
  for (; i < n; ++i) sum += x[i] * x[i];
  return 1.0f / std::sqrt(sum / n + eps);
}

AXPO_CLONES void forward_row(const float* x, const float* w, float* y, int64_t n, float eps) {
  const float r = inverse_rms(x, n, eps);
  for (int64_t i = 0; i < n; ++i) y[i] = w[i] * (x[i] * r);
}

AXPO_CLONES void add_row(const float* a, const float* b, float* sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] = a[i] + b[i];
}

// With x̂ = x r and g = dy w:  dx = r (g − x̂ mean(g x̂)) + dsum,  dw += dy x̂.
AXPO_CLONES void backward_row(const float* dy, const float* dsum, const float* x, const float* w, float* dx, float* dw,
                              int64_t n, float eps) {
  const float r = inverse_rms(x, n, eps);
  f32x8 acc = splat8(0.0f);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) acc += load8(dy + i) * load8(w + i) * load8(x + i);
  float dot = sum8(acc);
  for (; i < n; ++i) dot += dy[i] * w[i] * x[i];
  const float mean = dot * r / n;
  if (dsum == nullptr) {
    for (i = 0; i < n; ++i) {
      const float xhat = x[i] * r;
      dx[i] = r * (dy[i] * w[i] - xhat * mean);
      dw[i] += dy[i] * xhat;
    }
  } else {
    for (i = 0; i < n; ++i) {
      const float xhat = x[i] * r;
      dx[i] = r * (dy[i] * w[i] - xhat * mean) + dsum[i];
      dw[i] += dy[i] * xhat;
    }
  }
}

void check_weight(const char* op, const Tensor& x, const Tensor& weight) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1), op, ": weight has shape ",
                    weight.sizes(), ", but the last dimension of x ", x.sizes(), " needs one entry each");
}

Tensor rmsnorm(const Tensor& x, const Tensor& weight, double eps) {
  check_weight("rmsnorm", x, weight);
  Tensor y = at::empty(x.sizes(), x.options());
  const Tensor wc = weight.to(at::kFloat).contiguous();
  by_dtype(x, [&]<class T>(T) {
    const int64_t n = x.size(-1);
    const Rows<T> in = rows_of<T>(x);
    const float* w = wc.const_data_ptr<float>();
    T* out = y.mutable_data_ptr<T>();
    at::parallel_for(0, in.rows, grain_rows(n), [&](int64_t begin, int64_t end) {
      FloatRow from, to;
      for (int64_t r = begin; r < end; ++r) {
        forward_row(from.read(in[r], n), w, to.begin(out + r * n, n), n, eps);
        to.finish(out + r * n, n);
      }
    });
  });
  return y;
}

tuple<Tensor, Tensor> add_rmsnorm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  check_weight("add_rmsnorm", x, weight);
  TORCH_CHECK_VALUE(x.sizes() == residual.sizes(), "add_rmsnorm: residual has shape ", residual.sizes(),
                    ", but x has ", x.sizes(), ": they must agree");
  Tensor y = at::empty(x.sizes(), x.options()), sum = at::empty(x.sizes(), x.options());
  const Tensor wc = weight.to(at::kFloat).contiguous();
  by_dtype(x, [&]<class T>(T) {
    const int64_t n = x.size(-1);
    const Rows<T> a = rows_of<T>(x), b = rows_of<T>(residual);
    const float* w = wc.const_data_ptr<float>();
    T *out = y.mutable_data_ptr<T>(), *total = sum.mutable_data_ptr<T>();
    at::parallel_for(0, a.rows, grain_rows(n), [&](int64_t begin, int64_t end) {
      FloatRow left, right, added, to;
      for (int64_t r = begin; r < end; ++r) {
        T* row = total + r * n;
        add_row(left.read(a[r], n), right.read(b[r], n), added.begin(row, n), n);
        added.finish(row, n);
        // The norm sees the sum as it is passed on.
        forward_row(added.read(row, n), w, to.begin(out + r * n, n), n, eps);
        to.finish(out + r * n, n);
      }
    });
  });
  return {y, sum};
}

// Gradients of x (plus grad_sum, when the normalised value is also passed on as the residual) and of weight.
tuple<Tensor, Tensor> rmsnorm_backward(const Tensor& grad, const optional<Tensor>& grad_sum, const Tensor& x,
                                       const Tensor& weight, double eps) {
  Tensor dx = at::empty(x.sizes(), x.options());
  Tensor dw = at::zeros_like(weight, weight.options().dtype(at::kFloat), at::MemoryFormat::Contiguous);
  const Tensor wc = weight.to(at::kFloat).contiguous();
  by_dtype(x, [&]<class T>(T) {
    const int64_t n = x.size(-1);
    const Rows<T> in = rows_of<T>(x), dy = rows_of<T>(grad), ds = rows_of<T>(grad_sum ? *grad_sum : grad);
    const float* w = wc.const_data_ptr<float>();
    const int64_t parts = (in.rows + kPartition - 1) / kPartition;
    if (parts == 0) return;
    Tensor partial = at::empty({parts, n}, dw.options());
    T* out = dx.mutable_data_ptr<T>();
    float* part = partial.mutable_data_ptr<float>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      FloatRow a, b, c, to;
      for (int64_t p = begin; p < end; ++p) {
        std::memset(part + p * n, 0, n * sizeof(float));
        for (int64_t r = p * kPartition; r < std::min(in.rows, (p + 1) * kPartition); ++r) {
          const float* dsum = grad_sum ? b.read(ds[r], n) : nullptr;
          backward_row(a.read(dy[r], n), dsum, c.read(in[r], n), w, to.begin(out + r * n, n), part + p * n, n, eps);
          to.finish(out + r * n, n);
        }
      }
    });
    float* total = dw.mutable_data_ptr<float>();
    for (int64_t p = 0; p < parts; ++p) add_row(total, part + p * n, total, n);
  });
  return {dx, dw.to(weight.scalar_type())};
}

// --- autograd --------------------------------------------------------------------------------------------------------

const auto& rmsnorm_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("axpo::rmsnorm", "").typed<decltype(rmsnorm)>();
  return op;
}
const auto& add_rmsnorm_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("axpo::add_rmsnorm", "").typed<decltype(add_rmsnorm)>();
  return op;
}
const auto& rmsnorm_backward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("axpo::rmsnorm_backward", "").typed<decltype(rmsnorm_backward)>();
  return op;
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight});
    ctx->saved_data["eps"] = eps;
    return rmsnorm_op().call(x, weight, eps);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto [dx, dw] =
        rmsnorm_backward_op().call(grads[0], std::nullopt, saved[0], saved[1], ctx->saved_data["eps"].toDouble());
    return {dx, dw, Tensor()};
  }
};

struct AddRmsNormFunction : torch::autograd::Function<AddRmsNormFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& residual, const Tensor& weight,
                               double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, sum] = add_rmsnorm_op().call(x, residual, weight, eps);
    ctx->save_for_backward({sum, weight});
    ctx->saved_data["eps"] = eps;
    return {y, sum};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto [dx, dw] =
        rmsnorm_backward_op().call(grads[0], grads[1], saved[0], saved[1], ctx->saved_data["eps"].toDouble());
    return {dx, dx, dw, Tensor()};
  }
};

Tensor rmsnorm_autograd(const Tensor& x, const Tensor& weight, double eps) {
  if (needs_autograd(x, weight)) return RmsNormFunction::apply(x, weight, eps);
  at::AutoDispatchBelowADInplaceOrView guard;
  return rmsnorm_op().call(x, weight, eps);
}

tuple<Tensor, Tensor> add_rmsnorm_autograd(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  if (needs_autograd(x, residual, weight)) {
    const variable_list out = AddRmsNormFunction::apply(x, residual, weight, eps);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return add_rmsnorm_op().call(x, residual, weight, eps);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def("rmsnorm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.impl("rmsnorm", c10::DispatchKey::CPU, TORCH_FN(rmsnorm));
  m.impl("rmsnorm", c10::DispatchKey::Autograd, TORCH_FN(rmsnorm_autograd));
  m.def("add_rmsnorm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.impl("add_rmsnorm", c10::DispatchKey::CPU, TORCH_FN(add_rmsnorm));
  m.impl("add_rmsnorm", c10::DispatchKey::Autograd, TORCH_FN(add_rmsnorm_autograd));
  m.def("rmsnorm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.impl("rmsnorm_backward", c10::DispatchKey::CPU, TORCH_FN(rmsnorm_backward));
}

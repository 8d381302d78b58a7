// The products of panels.h, compiled once, and the operator that gives the LM head's logits. See kernels/packed.
#include "panels.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace axpo {
namespace {

// Eight rows fill the registers of AVX-512; two those of older processors.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && __GNUC__ >= 12
__attribute__((target("arch=x86-64-v4"))) void product_wide(const Product& p) { product_of<8>(p); }
bool has_wide() { return __builtin_cpu_supports("x86-64-v4"); }
#else
void product_wide(const Product&) {}
bool has_wide() { return false; }
#endif
AXPO_CLONES void product_narrow(const Product& p) { product_of<2>(p); }

constexpr int64_t kRowsOfAThread = 16;

// x [M, K] times panels [N / 32, K, 32] of a weight [columns, K] -> [M, columns].
at::Tensor packed_linear(const at::Tensor& x_in, const at::Tensor& panels, int64_t columns) {
  const at::Tensor x = x_in.contiguous();
  TORCH_CHECK_VALUE(x.dim() == 2 && panels.dim() == 3 && panels.size(1) == x.size(1) && panels.size(2) == kPanel &&
                        panels.size(0) == (columns + kPanel - 1) / kPanel && panels.is_contiguous(),
                    "packed_linear: x ", x.sizes(), " and panels ", panels.sizes(), " must be [M, K] and [",
                    (columns + kPanel - 1) / kPanel, ", K, ", kPanel, "] for ", columns, " columns");
  at::Tensor out = at::empty({x.size(0), columns}, x.options());
  const int64_t inner = x.size(1);
  const float *from = x.const_data_ptr<float>(), *weights = panels.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, x.size(0), kRowsOfAThread, [&](int64_t begin, int64_t end) {
    product({from + begin * inner, inner, end - begin, inner, weights, nullptr, columns, to + begin * columns, columns,
             Then::kStore});
  });
  return out;
}

}  // namespace

void product(const Product& p) {
  static const bool wide = has_wide();
  wide ? product_wide(p) : product_narrow(p);
}

}  // namespace axpo

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def("packed_linear(Tensor x, Tensor panels, int columns) -> Tensor");
  m.impl("packed_linear", c10::DispatchKey::CPU, TORCH_FN(axpo::packed_linear));
}

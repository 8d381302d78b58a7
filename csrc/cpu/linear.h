// y = x weight^T + bias on the CPU for the other C++ kernels. See linear.cpp and kernels/linear.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace axpo {

// x: [..., K], weight: [N, K], bias: [N] or none, all fp32 or all bf16. Returns [..., N] in their dtype, or in fp32
// when `wide`. Raises ValueError for shapes that disagree.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, bool wide);

}  // namespace axpo

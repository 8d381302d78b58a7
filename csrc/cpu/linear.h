// y = x weight^T + bias on the CPU for the other C++ kernels. See linear.cpp and kernels/linear.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "attention.h"

namespace axpo {

// x: [..., K], weight: [N, K], bias: [N] or none, all fp32 or all bf16. Returns [..., N] in their dtype, or in fp32
// when `wide`. Raises ValueError for shapes that disagree.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, bool wide);

// Floats of memory that a thread needs for a part of a product.
int64_t product_scratch();

// x [M, K], contiguous, in the order that products read it in: for kernels that use up a product part by part.
struct Strips {
  explicit Strips(const at::Tensor& x);
  // out[r * out_stride + c] = row `row + r` of x times row `first + c` of the weight, the bits of `linear`, wide. At
  // most 256 rows; weight [N, K] of x's dtype with dense rows. On the calling thread.
  void times(const at::Tensor& weight, int64_t row, int64_t count, int64_t first, int64_t end, float* out,
             int64_t out_stride, float* scratch) const;

  int64_t rows;
  Buffer memory;
};

}  // namespace axpo

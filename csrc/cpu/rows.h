// Row views and dispatcher helpers shared by the token-wise kernels (rmsnorm, rotary, swiglu).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include "common.h"

namespace axpo {

// Work below this many elements stays on one thread: starting the team costs more than the loop.
constexpr int64_t kGrain = 16384;

static inline int64_t grain_rows(int64_t row_length) { return row_length >= kGrain ? 1 : kGrain / (row_length + 1) + 1; }

// Rows of a tensor [..., H] whose last dimension is dense; the dimensions before it may be strided (a head view of a
// fused projection is not copied). Row r starts at data + (r / inner) * outer_stride + (r % inner) * inner_stride.
struct Rows {
  at::Tensor keep;  // owns the memory when the input had to be copied
  const float* data;
  int64_t rows, inner, outer_stride, inner_stride;

  const float* operator[](int64_t r) const {
    return inner == 1 ? data + r * outer_stride : data + (r / inner) * outer_stride + (r % inner) * inner_stride;
  }
};

static inline Rows rows_of(const at::Tensor& x) {
  const int64_t dim = x.dim(), length = x.size(-1);
  const bool dense = length <= 1 || x.stride(-1) == 1;
  Rows r;
  r.keep = dense && dim <= 3 ? x : x.contiguous();
  r.data = r.keep.const_data_ptr<float>();
  r.rows = length == 0 ? 0 : x.numel() / length;
  if (dim == 3 && !r.keep.is_contiguous()) {
    r.inner = x.size(1), r.outer_stride = r.keep.stride(0), r.inner_stride = r.keep.stride(1);
  } else {
    r.inner = 1, r.inner_stride = 0;
    r.outer_stride = dim == 2 ? r.keep.stride(0) : length;
  }
  return r;
}

// Whether autograd has to see a call at all: without it the kernel is called directly, which is what decoding does.
template <class... Tensors>
static inline bool needs_autograd(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}

}  // namespace axpo

// Row views and dispatcher helpers shared by the token-wise kernels (rmsnorm, rotary, swiglu).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <utility>
#include <vector>

#include "lanes.h"

namespace axpo {

// Work below this many elements stays on one thread: starting the team costs more than the loop.
constexpr int64_t kGrain = 16384;

static inline int64_t grain_rows(int64_t row_length) { return row_length >= kGrain ? 1 : kGrain / (row_length + 1) + 1; }

// Rows of a tensor [..., H] whose last dimension is dense; the dimensions before it may be strided (a head view of a
// fused projection is not copied). Row r starts at data + (r / inner) * outer_stride + (r % inner) * inner_stride.
template <class T>
struct Rows {
  at::Tensor keep;  // owns the memory when the input had to be copied
  const T* data;
  int64_t rows, inner, outer_stride, inner_stride;

  const T* operator[](int64_t r) const {
    return inner == 1 ? data + r * outer_stride : data + (r / inner) * outer_stride + (r % inner) * inner_stride;
  }
};

template <class T = float>
static inline Rows<T> rows_of(const at::Tensor& x) {
  const int64_t dim = x.dim(), length = x.size(-1);
  const bool dense = length <= 1 || x.stride(-1) == 1;
  Rows<T> r;
  r.keep = dense && dim <= 3 ? x : x.contiguous();
  r.data = r.keep.template const_data_ptr<T>();
  r.rows = length == 0 ? 0 : x.numel() / length;
  if (dim == 3 && !r.keep.is_contiguous()) {
    r.inner = x.size(1), r.outer_stride = r.keep.stride(0), r.inner_stride = r.keep.stride(1);
  } else {
    r.inner = 1, r.inner_stride = 0;
    r.outer_stride = dim == 2 ? r.keep.stride(0) : length;
  }
  return r;
}

AXPO_CLONES static void widen_row(const bf16* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store8(to + i, Lanes<8>::load(from + i));
  for (; i < n; ++i) to[i] = load_one(from + i);
}

AXPO_CLONES static void round_row(const float* from, bf16* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store_row8(to + i, load8(from + i));
  for (; i < n; ++i) store_one(to + i, from[i]);
}

// A row as floats, which all arithmetic is in: the row itself, or of bf16 a copy.
class FloatRow {
 public:
  const float* read(const float* row, int64_t) { return row; }
  const float* read(const bf16* row, int64_t n) {
    memory_.resize(n);
    widen_row(row, memory_.data(), n);
    return memory_.data();
  }
  // Where a row is to be written; it has its values after finish().
  float* begin(float* row, int64_t) { return row; }
  float* begin(bf16*, int64_t n) {
    memory_.resize(n);
    return memory_.data();
  }
  void finish(float*, int64_t) {}
  void finish(bf16* row, int64_t n) { round_row(memory_.data(), row, n); }

 private:
  std::vector<float> memory_;
};

// f(float()) or f(bf16()), by the tensor's dtype.
template <class F>
static inline auto by_dtype(const at::Tensor& x, F&& f) {
  if (x.scalar_type() == at::kBFloat16) return f(bf16());
  return f(float());
}

// Whether autograd has to see a call at all: without it the kernel is called directly, which is what decoding does.
template <class... Tensors>
static inline bool needs_autograd(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}

}  // namespace axpo

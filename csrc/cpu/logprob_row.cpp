// Row kernels of linear_logprob_entropy over one vocabulary chunk of fp32 logits, in place. See
// kernels/linear_logprob_entropy/chunked.py for the algorithm and the same steps in plain torch.
#include "softmax_row.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "rows.h"

namespace {
using namespace axpo;
using at::Tensor;

struct Chunk {
  float max;
  double sum, centred;
};

AXPO_CLONES Chunk reduce_row(float* logits, int64_t n, float temperature) {
  Chunk c;
  bool invalid;
  c.max = scale_row(logits, logits, n, temperature, &invalid);
  softmax_sums(logits, n, c.max, &c.sum, &c.centred);
  if (invalid) c.sum = std::numeric_limits<double>::quiet_NaN();  // reaches both results, so it cannot go unseen
  return c;
}

// logits [N, C] (consumed), temperature [N], labels [N], state [N, 4] fp64 = running max, sum, centred, label's z.
void logprob_reduce(Tensor& logits, const Tensor& temperature, const Tensor& labels, int64_t first, Tensor& state) {
  const int64_t rows = logits.size(0), n = logits.size(1);
  TORCH_CHECK(logits.is_contiguous() && temperature.is_contiguous() && labels.is_contiguous() && state.is_contiguous());
  float* data = logits.mutable_data_ptr<float>();
  const float* t = temperature.const_data_ptr<float>();
  const int64_t* label = labels.const_data_ptr<int64_t>();
  double* states = state.mutable_data_ptr<double>();
  at::parallel_for(0, rows, grain_rows(n), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Chunk c = reduce_row(data + r * n, n, t[r]);
      double* s = states + r * 4;
      // Both sums are moved to the new maximum; the centred one also shifts by sum * (old - new).
      const double max = std::max(s[0], (double)c.max);
      const double old_shift = s[0] - max, new_shift = c.max - max;
      const double a = s[1] == 0 ? 0 : std::exp(old_shift), b = c.sum == 0 ? 0 : std::exp(new_shift);
      s[2] = (a == 0 ? 0 : a * (s[2] + s[1] * old_shift)) + (b == 0 ? 0 : b * (c.centred + c.sum * new_shift));
      s[1] = a * s[1] + b * c.sum;
      s[0] = max;
      if (label[r] >= first && label[r] < first + n) s[3] = data[r * n + label[r] - first];
    }
  });
}

// logits -> gradient of the unscaled logits: (g_lp (1[j=y] - p) - g_H p (log p + H)) / T.
// label: its column in this chunk, or -1.
AXPO_CLONES void gradient_row(float* logits, int64_t n, int64_t label, float temperature, float logprob, float entropy,
                              float max, float log_sum, float grad_logprob, float grad_entropy) {
  const f32x8 t = splat8(temperature), m = splat8(max), ls = splat8(log_sum), h = splat8(entropy);
  const f32x8 gl = splat8(grad_logprob), gh = splat8(grad_entropy), floor = splat8(-104.0f);  // p is 0 there
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const f32x8 logp = max8((load8(logits + i) / t - m) - ls, floor);
    store8(logits + i, -exp8(logp) * (gl + gh * (logp + h)) / t);
  }
  if (i < n) {
    const f32x8 logp = max8((load_tail(logits + i, n - i, 0.0f) / t - m) - ls, floor);
    const f32x8 dz = -exp8(logp) * (gl + gh * (logp + h)) / t;
    for (int64_t j = 0; i + j < n; ++j) logits[i + j] = dz[j];
  }
  if (label < 0) return;
  // 1 - p by expm1: the plain difference has no correct digit left when p is close to 1.
  const float logp = logprob < -104.0f ? -104.0f : logprob;
  logits[label] = (-grad_logprob * std::expm1(logp) - grad_entropy * std::exp(logp) * (logp + entropy)) / temperature;
}

// logprob, entropy, max, log_sum, grad_logprob, grad_entropy: [N] fp32. Rows whose label is ignore_index become zero.
void logprob_gradient(Tensor& logits, const Tensor& temperature, const Tensor& labels, int64_t first,
                      int64_t ignore_index, const Tensor& logprob, const Tensor& entropy, const Tensor& max,
                      const Tensor& log_sum, const Tensor& grad_logprob, const Tensor& grad_entropy) {
  const int64_t rows = logits.size(0), n = logits.size(1);
  TORCH_CHECK(logits.is_contiguous() && temperature.is_contiguous() && labels.is_contiguous());
  TORCH_CHECK(logprob.is_contiguous() && entropy.is_contiguous() && max.is_contiguous() && log_sum.is_contiguous());
  TORCH_CHECK(grad_logprob.is_contiguous() && grad_entropy.is_contiguous());
  float* data = logits.mutable_data_ptr<float>();
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const float *t = temperature.const_data_ptr<float>(), *m = max.const_data_ptr<float>();
  const float *ls = log_sum.const_data_ptr<float>(), *h = entropy.const_data_ptr<float>();
  const float* lp = logprob.const_data_ptr<float>();
  const float *gl = grad_logprob.const_data_ptr<float>(), *gh = grad_entropy.const_data_ptr<float>();
  at::parallel_for(0, rows, grain_rows(n), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (label[r] == ignore_index) {
        std::memset(data + r * n, 0, n * sizeof(float));
        continue;
      }
      const int64_t y = label[r] >= first && label[r] < first + n ? label[r] - first : -1;
      gradient_row(data + r * n, n, y, t[r], lp[r], h[r], m[r], ls[r], gl[r], gh[r]);
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def("logprob_reduce(Tensor(a!) logits, Tensor temperature, Tensor labels, int first, Tensor(b!) state) -> ()");
  m.impl("logprob_reduce", c10::DispatchKey::CPU, TORCH_FN(logprob_reduce));
  m.def(
      "logprob_gradient(Tensor(a!) logits, Tensor temperature, Tensor labels, int first, int ignore_index, "
      "Tensor logprob, Tensor entropy, Tensor max, Tensor log_sum, Tensor grad_logprob, Tensor grad_entropy) -> ()");
  m.impl("logprob_gradient", c10::DispatchKey::CPU, TORCH_FN(logprob_gradient));
}

// linear_logprob_entropy on the CPU: matrix products of one fixed shape, each by one thread, and row kernels on their
// fp32 results. See kernels/linear_logprob_entropy/chunked.py for the algorithm and the same steps in plain torch.
//
// BLAS libraries choose the order of a sum by the shape of a product and the number of threads. Here a task is a product
// of kRows rows (the last padded) inside a team of threads, so a row's bits depend on neither; and tasks are handed out
// as threads become free, so one that the system has put aside does not hold up the others.
#include "softmax_row.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

// Of MKL, where torch is built with it: how many threads it cuts its work for when the calling thread uses it.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);

namespace {
using namespace axpo;
using at::Tensor;

constexpr int64_t kRows = 64;       // of a product of logits or of hidden's gradient
// Rows and columns whose logits' gradient is held at a time by the backward: at most 64 MiB.
constexpr int64_t kHeldRows = 2048, kHeldColumns = 8192;
constexpr int64_t kWeightRows = 512, kHiddenColumns = 512;  // of a product of weight's gradient; of hidden's

// f(task) for each task, by all threads.
template <class F>
void each_task(int64_t tasks, const F& f) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;
#pragma omp parallel num_threads(at::get_num_threads())
  {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const int before = MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0;
    for (int64_t task = next++; task < tasks; task = next++) {
      try {
        f(task);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        error = std::current_exception();
        next = tasks;
      }
    }
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before);
  }
  if (error) std::rethrow_exception(error);
}

int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }

// x[begin : end] in fp32, with zeros after it up to `rows`.
Tensor rows_of(const Tensor& x, int64_t begin, int64_t end, int64_t rows) {
  const Tensor part = x.narrow(0, begin, end - begin);
  if (rows == end - begin) return part.to(at::kFloat);
  Tensor out = at::zeros({rows, x.size(1)}, x.options().dtype(at::kFloat));
  out.narrow(0, 0, end - begin).copy_(part);
  return out;
}

// --- forward ---------------------------------------------------------------------------------------------------------

AXPO_CLONES void reduce_row(float* logits, int64_t n, float temperature, RowSums* sums) {
  *sums = reduce_chunk(logits, logits, n, temperature);
}

// The state [N, 4] fp64 of weight's rows, which are tokens vocab_start, vocab_start + 1, …
Tensor linear_logprob_state(const Tensor& hidden, const Tensor& weight, const Tensor& labels, const Tensor& temperature,
                            int64_t vocab_start) {
  const int64_t n = hidden.size(0), v = weight.size(0), chunks = parts(v, kColumns);
  const Tensor labels_c = labels.contiguous(), temperature_c = temperature.contiguous();
  const int64_t* label = labels_c.const_data_ptr<int64_t>();
  const float* t = temperature_c.const_data_ptr<float>();
  const auto fp64 = hidden.options().dtype(at::kDouble);
  const Tensor partial = at::empty({chunks, n, 4}, fp64), state = at::empty({n, 4}, fp64);
  each_task(chunks, [&](int64_t chunk) {
    const int64_t first = chunk * kColumns, c = std::min(kColumns, v - first);
    const Tensor w = rows_of(weight, first, first + c, c).t();
    Tensor z = at::empty({kRows, c}, hidden.options().dtype(at::kFloat));
    float* logits = z.mutable_data_ptr<float>();
    double* states = partial.mutable_data_ptr<double>() + chunk * n * 4;
    for (int64_t row = 0; row < n; row += kRows) {
      const int64_t end = std::min(row + kRows, n);
      at::mm_out(z, rows_of(hidden, row, end, kRows), w);
      for (int64_t r = row; r < end; ++r) {
        float* line = logits + (r - row) * c;
        RowSums sums;
        reduce_row(line, c, t[r], &sums);
        states[r * 4] = sums.max, states[r * 4 + 1] = sums.sum, states[r * 4 + 2] = sums.centred;
        const int64_t y = label[r] - vocab_start - first;
        states[r * 4 + 3] = y >= 0 && y < c ? line[y] : -std::numeric_limits<double>::infinity();
      }
    }
  });
  const double* from = partial.const_data_ptr<double>();
  double* to = state.mutable_data_ptr<double>();
  at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      RowSums sums;
      double label = -kInfinity;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const double* s = from + (chunk * n + r) * 4;
        merge_sums(sums, RowSums{s[0], s[1], s[2]});
        label = std::max(label, s[3]);
      }
      to[r * 4] = sums.max, to[r * 4 + 1] = sums.sum, to[r * 4 + 2] = sums.centred, to[r * 4 + 3] = label;
    }
  });
  return state;
}

// --- backward --------------------------------------------------------------------------------------------------------

struct RowStatistics {
  float temperature, logprob, entropy, max, log_sum, grad_logprob, grad_entropy;
};

// logits -> gradient of the unscaled logits: (g_lp (1[j=y] - p) - g_H p (log p + H)) / T. label: its column, or -1.
AXPO_CLONES void gradient_row(float* logits, int64_t n, int64_t label, const RowStatistics& s) {
  const f32x8 t = splat8(s.temperature), m = splat8(s.max), ls = splat8(s.log_sum), h = splat8(s.entropy);
  const f32x8 gl = splat8(s.grad_logprob), gh = splat8(s.grad_entropy), floor = splat8(-104.0f);  // p is 0 there
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
  const float logp = s.logprob < -104.0f ? -104.0f : s.logprob;
  logits[label] = (-s.grad_logprob * std::expm1(logp) - s.grad_entropy * std::exp(logp) * (logp + s.entropy)) /
                  s.temperature;
}

// Gradients of hidden and weight in their dtypes; one that is not needed is empty. Rows labelled ignore_index give none.
std::tuple<Tensor, Tensor> linear_logprob_backward(
    const Tensor& grad_logprob, const Tensor& grad_entropy, const Tensor& hidden, const Tensor& weight,
    const Tensor& labels, const Tensor& temperature, const Tensor& logprob, const Tensor& entropy, const Tensor& max,
    const Tensor& log_sum, int64_t vocab_start, int64_t ignore_index, bool need_hidden, bool need_weight) {
  const int64_t n = hidden.size(0), h = hidden.size(1), v = weight.size(0);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  Tensor grad_hidden = at::zeros({need_hidden ? parts(n, kRows) * kRows : 0, h}, fp32);
  Tensor grad_weight = need_weight ? at::empty({v, h}, weight.options()) : at::empty({0}, weight.options());
  if (need_weight && n == 0) grad_weight.zero_();
  const Tensor labels_c = labels.contiguous();
  const int64_t* label = labels_c.const_data_ptr<int64_t>();
  Tensor rows[7] = {temperature, logprob, entropy, max, log_sum, grad_logprob, grad_entropy};
  const float* of[7];
  for (int i = 0; i < 7; ++i) rows[i] = rows[i].contiguous(), of[i] = rows[i].const_data_ptr<float>();
  const auto statistics = [&](int64_t r) {
    return RowStatistics{of[0][r], of[1][r], of[2][r], of[3][r], of[4][r], of[5][r], of[6][r]};
  };
  const int64_t held = std::min(parts(n, kRows) * kRows, kHeldRows), width = std::min(v, kHeldColumns);
  Tensor memory = at::empty({held * width}, fp32), w = at::empty({width, h}, fp32), x = at::empty({held, h}, fp32);
  const bool direct = weight.scalar_type() == at::kFloat;
  Tensor sums = need_weight && !direct ? at::empty({width, h}, fp32) : Tensor();
  for (int64_t first = 0; n > 0 && first < v; first += width) {
    const int64_t c = std::min(width, v - first);
    const Tensor total = !need_weight ? Tensor() : direct ? grad_weight.narrow(0, first, c) : sums.narrow(0, 0, c);
    for (int64_t start = 0; start < n; start += held) {
      const int64_t count = std::min(held, n - start), blocks = parts(count, kRows), chunks = parts(c, kColumns);
      Tensor dz = memory.narrow(0, 0, blocks * kRows * c).view({blocks * kRows, c});
      float* gradient = dz.mutable_data_ptr<float>();
      each_task(blocks + (start == 0 ? chunks : 0), [&](int64_t task) {  // both operands in fp32
        if (task < blocks) {
          const int64_t row = start + task * kRows;
          x.narrow(0, task * kRows, kRows).copy_(rows_of(hidden, row, std::min(row + kRows, n), kRows));
        } else {
          const int64_t column = (task - blocks) * kColumns, size = std::min(kColumns, c - column);
          w.narrow(0, column, size).copy_(weight.narrow(0, first + column, size));
        }
      });
      each_task(blocks * chunks, [&](int64_t task) {  // the logits again, and their gradient
        const int64_t block = task / chunks, column = task % chunks * kColumns, size = std::min(kColumns, c - column);
        Tensor out = dz.narrow(0, block * kRows, kRows).narrow(1, column, size);
        at::mm_out(out, x.narrow(0, block * kRows, kRows), w.narrow(0, column, size).t());
        for (int64_t i = 0; i < kRows; ++i) {
          float* line = gradient + (block * kRows + i) * c + column;
          const int64_t r = start + block * kRows + i;
          if (r >= n || label[r] == ignore_index) {
            std::memset(line, 0, size * sizeof(float));
            continue;
          }
          const int64_t y = label[r] - vocab_start - first - column;
          gradient_row(line, size, y >= 0 && y < size ? y : -1, statistics(r));
        }
      });
      const int64_t slices = need_hidden ? parts(h, kHiddenColumns) : 0;
      const int64_t weights = need_weight ? parts(c, kWeightRows) : 0;
      each_task(blocks * slices + weights, [&](int64_t task) {
        if (task < weights) {
          const int64_t row = task * kWeightRows, size = std::min(kWeightRows, c - row);
          Tensor out = total.narrow(0, row, size);
          const Tensor left = dz.narrow(1, row, size).t(), right = x.narrow(0, 0, blocks * kRows);
          if (start == 0) {
            at::mm_out(out, left, right);
          } else {
            at::addmm_out(out, out, left, right);
          }
          if (!direct && start + held >= n) grad_weight.narrow(0, first + row, size).copy_(out);
        } else {
          const int64_t block = (task - weights) / slices, column = (task - weights) % slices * kHiddenColumns;
          const int64_t size = std::min(kHiddenColumns, h - column);
          Tensor out = grad_hidden.narrow(0, start + block * kRows, kRows).narrow(1, column, size);
          at::addmm_out(out, out, dz.narrow(0, block * kRows, kRows), w.narrow(0, 0, c).narrow(1, column, size));
        }
      });
    }
  }
  if (!need_hidden) return {at::empty({0}, hidden.options()), grad_weight};
  return {grad_hidden.narrow(0, 0, n).to(hidden.scalar_type(), /*non_blocking=*/false, /*copy=*/true), grad_weight};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def("linear_logprob_state_cpu(Tensor hidden, Tensor weight, Tensor labels, Tensor temperature, int vocab_start) -> Tensor");
  m.impl("linear_logprob_state_cpu", c10::DispatchKey::CPU, TORCH_FN(linear_logprob_state));
  m.def(
      "linear_logprob_backward_cpu(Tensor grad_logprob, Tensor grad_entropy, Tensor hidden, Tensor weight, Tensor labels, "
      "Tensor temperature, Tensor logprob, Tensor entropy, Tensor max, Tensor log_sum, int vocab_start, int ignore_index, "
      "bool need_hidden, bool need_weight) -> (Tensor, Tensor)");
  m.impl("linear_logprob_backward_cpu", c10::DispatchKey::CPU, TORCH_FN(linear_logprob_backward));
}

// The LM head and the sampler in one pass: a chunk of logits is used up while it is in the cache. See kernels/sampling.
// Logits are those of `linear`, and a chunk's sums and noise are those of `sample`, so all results are, bit for bit.
#include "sample_chunk.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "linear.h"

namespace {
using namespace axpo;
using at::Tensor;

constexpr int64_t kRows = 128;  // whose chunk of logits fits in the L2 cache

std::tuple<Tensor, Tensor, Tensor> linear_sample(const Tensor& hidden, const Tensor& weight_in, const Tensor& seeds,
                                                 const Tensor& positions, const Tensor& temperature,
                                                 const std::optional<Tensor>& banned) {
  TORCH_CHECK_VALUE(hidden.dim() == 2 && weight_in.dim() == 2 && hidden.size(1) == weight_in.size(1) &&
                        weight_in.size(0) > 0 && hidden.scalar_type() == weight_in.scalar_type(),
                    "linear_sample: hidden ", hidden.sizes(), " and weight ", weight_in.sizes(),
                    " must be [B, H] and [V, H] of one dtype");
  const int64_t rows = hidden.size(0), n = weight_in.size(0), chunks = (n + kColumns - 1) / kColumns;
  for (const Tensor* t : {&seeds, &positions, &temperature}) {
    TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == rows, "linear_sample: an argument has shape ", t->sizes(),
                      ", but seeds, positions and temperature need one entry for each of the ", rows, " rows");
  }
  const Tensor weight = weight_in.stride(1) == 1 ? weight_in : weight_in.contiguous();
  const Tensor seeds_c = seeds.contiguous(), positions_c = positions.contiguous();
  const Tensor temperature_c = temperature.contiguous(), banned_c = banned ? banned->contiguous() : Tensor();
  const int64_t *seed = seeds_c.const_data_ptr<int64_t>(), *position = positions_c.const_data_ptr<int64_t>();
  const float* t = temperature_c.const_data_ptr<float>();
  const int64_t* ban = banned ? banned_c.const_data_ptr<int64_t>() : nullptr;
  const int64_t ban_count = banned ? banned_c.numel() : 0;
  for (int64_t i = 0; i < ban_count; ++i) {
    TORCH_CHECK_VALUE(ban[i] >= 0 && ban[i] < n, "sample: banned[", i, "] = ", ban[i],
                      " is outside the vocabulary of ", n);
  }
  for (int64_t r = 0; r < rows; ++r) {
    TORCH_CHECK_VALUE(t[r] >= 0.0f, "sample: temperature[", r, "] = ", t[r], " must be 0 (greedy) or above");
  }

  const Strips x(hidden.contiguous());
  std::vector<Chunk> found(chunks * rows);
  // Fewer rows a block where there would be less than one block a thread; bits do not depend on it.
  const int64_t threads = std::max<int64_t>(1, at::get_num_threads());
  const int64_t block = std::clamp<int64_t>((rows * chunks + threads - 1) / threads, 8, kRows);
  const int64_t row_blocks = (rows + block - 1) / block, most = std::min(rows, block);
  parallel_items(row_blocks * chunks, most * kColumns + product_scratch(), [&](int64_t item, float* scratch) {
    const int64_t chunk = item % chunks, first = chunk * kColumns, end = std::min(n, first + kColumns);
    const int64_t row = item / chunks * block, count = std::min(block, rows - row);
    x.times(weight, row, count, first, end, scratch, kColumns, scratch + most * kColumns);
    for (int64_t r = row; r < row + count; ++r) {
      use_up(scratch + (r - row) * kColumns, end - first, first, t[r], (uint64_t)seed[r], (uint64_t)position[r], ban,
             ban_count, &found[chunk * rows + r]);
    }
  });

  const auto fp32 = temperature.options();
  Tensor token = at::empty({rows}, seeds.options()), logprob = at::empty({rows}, fp32), entropy = at::empty({rows}, fp32);
  int64_t* token_out = token.mutable_data_ptr<int64_t>();
  float *logprob_out = logprob.mutable_data_ptr<float>(), *entropy_out = entropy.mutable_data_ptr<float>();
  for (int64_t r = 0; r < rows; ++r) {
    Chunk all;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) merge_chunk(all, found[chunk * rows + r]);
    const Drawn drawn = draw("sample", r, all);
    token_out[r] = drawn.token, logprob_out[r] = drawn.logprob, entropy_out[r] = drawn.entropy;
  }
  return {token, logprob, entropy};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def(
      "linear_sample_cpu(Tensor hidden, Tensor weight, Tensor seeds, Tensor positions, Tensor temperature, "
      "Tensor? banned=None) -> (Tensor, Tensor, Tensor)");
  m.impl("linear_sample_cpu", c10::DispatchKey::CPU, TORCH_FN(linear_sample));
}

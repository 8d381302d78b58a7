// The LM head and the sampler in one pass: a chunk of logits is used up while it is in the cache. See kernels/sampling.
// Logits are those of `linear`, and a chunk's sums and noise are those of `sample`, so all results are, bit for bit.
#include "gumbel.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "linear.h"

namespace {
using namespace axpo;
using at::Tensor;

constexpr int64_t kRows = 128;  // whose chunk of logits fits in the L2 cache

// What a row needs to know of a chunk: its sums, and its best token with the value that it won with.
struct Chunk {
  RowSums sums;
  int64_t token = -1;
  float won = -kInfinity, z = -kInfinity;
};

// logits: [kColumns], overwritten. banned: ids less than first + n, not below first.
AXPO_CLONES void use_up(float* logits, int64_t n, int64_t first, float temperature, uint64_t seed, uint64_t position,
                        const int64_t* banned, int64_t banned_count, Chunk* out) {
  const bool greedy = temperature == 0.0f;
  out->sums = reduce_chunk(logits, logits, n, greedy ? 1.0f : temperature);
  std::fill(logits + n, logits + kColumns, -kInfinity);
  for (int64_t i = 0; i < banned_count; ++i) {
    if (banned[i] >= first && banned[i] < first + n) logits[banned[i] - first] = -kInfinity;
  }
  int64_t at = -1;
  if (greedy) {
    at = std::max_element(logits, logits + n) - logits;
    out->won = logits[at];
    if (out->won == -kInfinity) at = -1;
  } else {
    at = gumbel_argmax(logits, n, first, seed, position, &out->won);
  }
  out->token = at < 0 ? -1 : first + at;
  out->z = at < 0 ? -kInfinity : logits[at];
}

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
  const int64_t row_blocks = (rows + kRows - 1) / kRows, most = std::min(rows, kRows);
  parallel_items(row_blocks * chunks, most * kColumns + product_scratch(), [&](int64_t item, float* scratch) {
    const int64_t chunk = item % chunks, first = chunk * kColumns, end = std::min(n, first + kColumns);
    const int64_t row = item / chunks * kRows, count = std::min(kRows, rows - row);
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
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {  // the first of equal ones wins, as it has the lowest ids
      const Chunk& c = found[chunk * rows + r];
      merge_sums(all.sums, c.sums);
      if (c.token >= 0 && (all.token < 0 || c.won > all.won)) all.token = c.token, all.won = c.won, all.z = c.z;
    }
    TORCH_CHECK_VALUE(all.sums.sum > 0, "sample: row ", r,
                      " of logits holds a NaN or +inf, or only -inf: there is no distribution to sample from");
    TORCH_CHECK_VALUE(all.token >= 0, "sample: row ", r, " has no token left: every one is banned or has logit -inf");
    const double log_sum = std::log(all.sums.sum);
    token_out[r] = all.token;
    logprob_out[r] = (float)((all.z - all.sums.max) - log_sum);
    entropy_out[r] = (float)(log_sum - all.sums.centred / all.sums.sum);
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

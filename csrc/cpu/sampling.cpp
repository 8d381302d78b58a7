// Sampling by counter-based Gumbel-max with top-k, top-p, min-p and banned ids. See kernels/sampling/reference.py, which
// defines every value that decides on a token; both use only operations that are rounded once (no fused multiply-add, no
// libm), so the tokens agree bit for bit on any machine.
#include "softmax_row.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "gumbel.h"
#include "rows.h"

namespace {
using namespace axpo;
using at::Tensor;

struct Params {
  uint64_t seed, position;
  float temperature, top_p, min_p;
  int64_t top_k;
};

// --- truncation ------------------------------------------------------------------------------------------------------

// Sorts by z downwards, then by index upwards, as one integer.
uint64_t order_key(float z, int64_t index) {
  uint32_t bits;
  z += 0.0f;  // -0 becomes +0
  std::memcpy(&bits, &z, sizeof bits);
  bits = bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
  return (uint64_t)bits << 32 | (uint64_t)index;
}

// Probabilities in units of 2^-40 of the largest one: integers add up to the same sum in any order.
AXPO_CLONES void weights(const float* z, float max, uint64_t* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    const f32x8 e = exp8(load8(z + i) - splat8(max)) * splat8(1099511627776.0f);
    for (int64_t j = 0; j < 8; ++j) out[i + j] = (uint64_t)e[j];
  }
}

// Sets z to -inf where e^(z - max) is below min_p. z is padded to whole vectors.
AXPO_CLONES void keep_min_p(float* z, int64_t n, float max, float min_p) {
  const f32x8 m = splat8(max), least = splat8(min_p), nothing = splat8(-kInfinity);
  for (int64_t i = 0; i < n; i += 8) {
    const f32x8 v = load8(z + i);
    store8(z + i, exp8(v - m) < least ? nothing : v);
  }
}

// Sets z to -inf outside the top_k largest (all that tie with the k-th stay).
void keep_top_k(std::vector<float>& z, int64_t n, int64_t top_k, std::vector<float>& scratch) {
  if (top_k <= 0 || top_k >= n) return;
  scratch.assign(z.begin(), z.begin() + n);
  std::nth_element(scratch.begin(), scratch.begin() + top_k - 1, scratch.end(), std::greater<float>());
  const float threshold = scratch[top_k - 1];
  for (int64_t i = 0; i < n; ++i) z[i] = z[i] < threshold ? -kInfinity : z[i];
}

// Buckets of 1/8 nat below the largest logit, and one for the rest: which one a token falls in never breaks the order.
constexpr int64_t kBuckets = 129;

static AXPO_INLINE int64_t bucket_of(float max, float z) {
  const float below = max - z;
  return below < 16.0f ? (int64_t)(below * 8.0f) : kBuckets - 1;
}

// Sets z to -inf outside the smallest set of most probable tokens whose mass reaches top_p of what is left. The last
// token kept is first narrowed down to a bucket, then within it by halving.
void keep_top_p(std::vector<float>& z, int64_t n, float max, float top_p, std::vector<uint64_t>& keys,
                std::vector<uint64_t>& weight) {
  weight.resize(z.size());
  weights(z.data(), max, weight.data(), (int64_t)z.size());
  uint64_t mass[kBuckets] = {}, total = 0, above = 0;
  for (int64_t i = 0; i < n; ++i) {
    mass[bucket_of(max, z[i])] += weight[i];
    total += weight[i];
  }
  const double need = (double)top_p * (double)total;
  int64_t bucket = 0;
  while (bucket < kBuckets - 1 && (double)(above + mass[bucket]) < need) above += mass[bucket++];
  keys.clear();
  for (int64_t i = 0; i < n; ++i) {
    if (bucket_of(max, z[i]) == bucket) keys.push_back(order_key(z[i], i));
  }
  auto low = keys.begin(), high = keys.end();
  while (high - low > 1) {
    const auto middle = low + (high - low) / 2;
    std::nth_element(low, middle, high);
    uint64_t half = 0;
    for (auto it = low; it != middle; ++it) half += weight[*it & 0xffffffffu];
    if ((double)(above + half) >= need) {
      high = middle;
    } else {
      above += half;
      low = middle;
    }
  }
  const float last = z[*low & 0xffffffffu];
  const int64_t last_index = *low & 0xffffffffu;
  for (int64_t i = 0; i < n; ++i) {
    if (z[i] < last || (z[i] == last && i > last_index)) z[i] = -kInfinity;
  }
}

// --- one row ---------------------------------------------------------------------------------------------------------

struct Scratch {
  std::vector<float> z, copy;
  std::vector<uint64_t> keys, weight;
};

AXPO_CLONES void chunk_statistics(const float* logits, float* z, int64_t n, float temperature, RowSums* sums) {
  *sums = reduce_chunk(logits, z, n, temperature);
}

RowSums row_statistics(const float* logits, float* z, int64_t n, float temperature) {
  RowSums sums, chunk;
  for (int64_t i = 0; i < n; i += kColumns) {
    chunk_statistics(logits + i, z + i, std::min(kColumns, n - i), temperature, &chunk);
    merge_sums(sums, chunk);
  }
  return sums;
}

AXPO_CLONES int64_t draw(const float* z, int64_t n, uint64_t seed, uint64_t position) {
  float best;
  return gumbel_argmax(z, n, 0, seed, position, &best);
}

int64_t first_argmax(const std::vector<float>& z, int64_t n) {
  const auto it = std::max_element(z.begin(), z.begin() + n);
  return *it == -kInfinity ? -1 : it - z.begin();
}

void sample_row(const float* logits, int64_t n, const Params& p, const int64_t* banned, int64_t banned_count,
                int64_t row, Scratch& scratch, int64_t* token, float* logprob, float* entropy) {
  std::vector<float>& z = scratch.z;
  const bool greedy = p.temperature == 0.0f;
  const RowSums sums = row_statistics(logits, z.data(), n, greedy ? 1.0f : p.temperature);
  TORCH_CHECK_VALUE(sums.sum > 0, "sample: row ", row,
                    " of logits holds a NaN or +inf, or only -inf: there is no distribution to sample from");
  std::fill(z.begin() + n, z.end(), -kInfinity);
  for (int64_t i = 0; i < banned_count; ++i) z[banned[i]] = -kInfinity;
  if (greedy) {
    *token = first_argmax(z, n);
  } else {
    const bool truncates = p.top_p < 1.0f || p.min_p > 0.0f;
    const int64_t top = truncates ? first_argmax(z, n) : -1;
    if (top >= 0 && p.min_p > 0.0f) keep_min_p(z.data(), n, z[top], p.min_p);
    keep_top_k(z, n, p.top_k, scratch.copy);
    if (top >= 0 && p.top_p < 1.0f) keep_top_p(z, n, z[top], p.top_p, scratch.keys, scratch.weight);
    *token = draw(z.data(), n, p.seed, p.position);
  }
  TORCH_CHECK_VALUE(*token >= 0, "sample: row ", row, " has no token left: every one is banned or has logit -inf");
  const double log_sum = std::log(sums.sum), chosen = greedy ? logits[*token] : logits[*token] / p.temperature;
  *logprob = (float)((chosen - sums.max) - log_sum);
  *entropy = (float)(log_sum - sums.centred / sums.sum);
}

std::tuple<Tensor, Tensor, Tensor> sample(const Tensor& logits, const Tensor& seeds, const Tensor& positions,
                                          const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                                          const std::optional<Tensor>& banned, const std::optional<Tensor>& min_p) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0, "sample: logits has shape ", logits.sizes(),
                    ": it must be [B, V] with V at least 1");
  const int64_t rows = logits.size(0), n = logits.size(1);
  for (const Tensor* t : {&seeds, &positions, &temperature, &top_k, &top_p}) {
    TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == rows, "sample: an argument has shape ", t->sizes(),
                      ", but seeds, positions, temperature, top_k and top_p need one entry for each of the ", rows,
                      " rows of logits");
  }
  TORCH_CHECK_VALUE(!min_p || (min_p->dim() == 1 && min_p->size(0) == rows), "sample: min_p must be None or hold one "
                    "entry for each of the ", rows, " rows of logits");
  const Tensor min_p_c = min_p ? min_p->contiguous() : Tensor();
  const float* least = min_p ? min_p_c.const_data_ptr<float>() : nullptr;
  for (int64_t r = 0; least && r < rows; ++r) {
    TORCH_CHECK_VALUE(least[r] >= 0.0f && least[r] <= 1.0f, "sample: min_p[", r, "] = ", least[r],
                      " must lie in [0, 1], where 0 is off");
  }
  const Tensor seeds_c = seeds.contiguous(), positions_c = positions.contiguous(), top_k_c = top_k.contiguous();
  const Tensor temperature_c = temperature.contiguous(), top_p_c = top_p.contiguous();
  const Tensor banned_c = banned ? banned->contiguous() : Tensor();
  const int64_t* ban = banned ? banned_c.const_data_ptr<int64_t>() : nullptr;
  const int64_t ban_count = banned ? banned_c.numel() : 0;
  for (int64_t i = 0; i < ban_count; ++i) {
    TORCH_CHECK_VALUE(ban[i] >= 0 && ban[i] < n, "sample: banned[", i, "] = ", ban[i],
                      " is outside the vocabulary of ", n);
  }
  const float *t = temperature_c.const_data_ptr<float>(), *p = top_p_c.const_data_ptr<float>();
  for (int64_t r = 0; r < rows; ++r) {
    TORCH_CHECK_VALUE(t[r] >= 0.0f, "sample: temperature[", r, "] = ", t[r], " must be 0 (greedy) or above");
  }
  Tensor token = at::empty({rows}, seeds.options());
  Tensor logprob = at::empty({rows}, logits.options()), entropy = at::empty({rows}, logits.options());
  const int64_t *seed = seeds_c.const_data_ptr<int64_t>(), *position = positions_c.const_data_ptr<int64_t>();
  const int64_t* k = top_k_c.const_data_ptr<int64_t>();
  int64_t* token_out = token.mutable_data_ptr<int64_t>();
  float *logprob_out = logprob.mutable_data_ptr<float>(), *entropy_out = entropy.mutable_data_ptr<float>();
  const Rows<float> in = rows_of(logits);
  at::parallel_for(0, rows, grain_rows(n), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    scratch.z.resize((n + kBlock - 1) / kBlock * kBlock);
    for (int64_t r = begin; r < end; ++r) {
      sample_row(in[r], n, Params{(uint64_t)seed[r], (uint64_t)position[r], t[r], p[r], least ? least[r] : 0.0f, k[r]},
                 ban, ban_count, r, scratch, token_out + r, logprob_out + r, entropy_out + r);
    }
  });
  return {token, logprob, entropy};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def(
      "sample(Tensor logits, Tensor seeds, Tensor positions, Tensor temperature, Tensor top_k, Tensor top_p, "
      "Tensor? banned=None, Tensor? min_p=None) -> (Tensor, Tensor, Tensor)");
  m.impl("sample", c10::DispatchKey::CPU, TORCH_FN(sample));
}

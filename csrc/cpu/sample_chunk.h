// The sampler over a row of logits that is made and used up chunk by chunk. See kernels/sampling. To be included before
// anything else, as softmax_row.h.
#pragma once

#include "gumbel.h"

#include <c10/util/Exception.h>

namespace axpo {

// What a row needs to know of a chunk: its sums, and its best token with the value that it won with.
struct Chunk {
  RowSums sums;
  int64_t token = -1;
  float won = -kInfinity, z = -kInfinity;
};

// Reduces a row's logits of the tokens from `first` on, [n] in room for whole blocks (kBlock), which are overwritten.
// banned: ids less than first + n, not below first.
AXPO_CLONES static void use_up(float* logits, int64_t n, int64_t first, float temperature, uint64_t seed, uint64_t position,
                        const int64_t* banned, int64_t banned_count, Chunk* out) {
  const bool greedy = temperature == 0.0f;
  out->sums = reduce_chunk(logits, logits, n, greedy ? 1.0f : temperature);
  std::fill(logits + n, logits + (n + kBlock - 1) / kBlock * kBlock, -kInfinity);
  for (int64_t i = 0; i < banned_count; ++i) {
    if (banned[i] >= first && banned[i] < first + n) logits[banned[i] - first] = -kInfinity;
  }
  int64_t at = -1;
  if (greedy) {
    at = first_largest(logits, n);
    out->won = at < 0 ? -kInfinity : logits[at];
  } else {
    at = gumbel_argmax(logits, n, first, seed, position, &out->won);
  }
  out->token = at < 0 ? -1 : first + at;
  out->z = at < 0 ? -kInfinity : logits[at];
}

// Chunks are merged in their order: the first of equal ones wins, as it has the lowest ids.
static inline void merge_chunk(Chunk& all, const Chunk& c) {
  merge_sums(all.sums, c.sums);
  if (c.token >= 0 && (all.token < 0 || c.won > all.won)) all.token = c.token, all.won = c.won, all.z = c.z;
}

struct Drawn {
  int64_t token;
  float logprob, entropy;
};

// What a whole row gives. `name`: of the operator. Raises ValueError where there is nothing to sample from.
static inline Drawn draw(const char* name, int64_t row, const Chunk& all) {
  TORCH_CHECK_VALUE(all.sums.sum > 0, name, ": row ", row,
                    " of logits holds a NaN or +inf, or only -inf: there is no distribution to sample from");
  TORCH_CHECK_VALUE(all.token >= 0, name, ": row ", row, " has no token left: every one is banned or has logit -inf");
  const double log_sum = std::log(all.sums.sum);
  return {all.token, (float)((all.z - all.sums.max) - log_sum),
          (float)(log_sum - all.sums.centred / all.sums.sum)};
}

}  // namespace axpo

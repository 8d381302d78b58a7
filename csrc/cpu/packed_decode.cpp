// Several decoding steps of a small Qwen3 in one call, LM head and sampler included. See kernels/packed.
//
// Rows are sequences that share at most KV which nobody writes, so a thread takes its rows through all steps without
// waiting for anybody; a row that has said its last token drops out. The numbers are those of packed_forward and
// linear_sample, bit for bit: a logit is one chain of multiply-adds in both, and sampling is the same code.
#include "sample_chunk.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "attention.h"
#include "packed_layers.h"
#include "panels.h"

namespace {
using namespace axpo;
using at::Tensor;

constexpr int64_t kJobRows = 64;  // of a job, at most about

// What all rows have in common, and the columns of the batch, one entry (or row) a sequence.
struct Batch {
  const float* head;  // panels of the LM head
  const int64_t* banned;
  int64_t vocabulary, banned_count;
  const int64_t *token, *position, *delta, *seed, *count, *stops;
  const float* temperature;
  const int32_t* tables;
  int64_t columns, stop_columns;
  float* kv;
  int64_t plane, block_size;
  int64_t *tokens, *made, most;  // out: [n, most] and [n]
  float *logprobs, *entropies;

  bool stops_at(int64_t row, int64_t id) const {
    const int64_t* from = stops + row * stop_columns;
    return std::find(from, from + stop_columns, id) != from + stop_columns;
  }
};

int64_t logits_width(const Batch& b) { return (std::min(b.vocabulary, kColumns) + kBlock - 1) / kBlock * kBlock; }

int64_t decode_scratch(const Model& m, const Batch& b, int64_t rows, int64_t most_keys) {
  return job_scratch(m, rows, most_keys) + rows * (m.hidden + logits_width(b)) + 32;
}

// The step's tokens of `rows`, [rows.size()] indices into the batch, from their hidden states.
void sample_rows(const Model& m, const Batch& b, const std::vector<int64_t>& rows, const std::vector<int64_t>& positions,
                 const float* hidden, float* logits, std::vector<Drawn>& drawn) {
  const int64_t count = static_cast<int64_t>(rows.size()), width = logits_width(b);
  std::vector<Chunk> all(count);
  for (int64_t first = 0; first < b.vocabulary; first += kColumns) {
    const int64_t n = std::min(kColumns, b.vocabulary - first);
    product({hidden, m.hidden, count, m.hidden, b.head + first * m.hidden, nullptr, n, logits, width, Then::kStore});
    for (int64_t r = 0; r < count; ++r) {
      Chunk chunk;
      use_up(logits + r * width, n, first, b.temperature[rows[r]], (uint64_t)b.seed[rows[r]], (uint64_t)positions[r] + 1,
             b.banned, b.banned_count, &chunk);
      merge_chunk(all[r], chunk);
    }
  }
  for (int64_t r = 0; r < count; ++r) drawn[r] = draw("packed_decode", rows[r], all[r]);
}

// Decodes the rows from `begin` to `end` until each has its tokens.
void decode_rows(const Model& m, const Batch& b, int64_t begin, int64_t end, int64_t most_keys, float* scratch) {
  std::vector<int64_t> rows, tokens, positions, wanted, turns;
  for (int64_t r = begin; r < end; ++r) {
    if (b.count[r] == 0) continue;
    rows.push_back(r), tokens.push_back(b.token[r]), positions.push_back(b.position[r]);
    wanted.push_back(static_cast<int64_t>(wanted.size()));
  }
  std::vector<Drawn> drawn(rows.size());
  float* hidden = scratch + job_scratch(m, end - begin, most_keys);
  float* logits = hidden + (end - begin) * m.hidden;
  Step step{};
  step.kv = b.kv, step.plane = b.plane, step.block_size = b.block_size, step.most_keys = most_keys, step.out = hidden;
  while (!rows.empty()) {
    const int64_t count = static_cast<int64_t>(rows.size());
    step.rows = step.wanted_count = count;
    step.slots.resize(count), step.spans.resize(count), turns.resize(3 * count);
    for (int64_t r = 0; r < count; ++r) {
      const int32_t* blocks = b.tables + rows[r] * b.columns;
      const int64_t at = positions[r];
      step.slots[r] = blocks[at / b.block_size] * b.block_size + at % b.block_size;
      step.spans[r] = {r, 1, at + 1, blocks};
      for (int64_t a = 0; a < 3; ++a) turns[a * count + r] = at + b.delta[rows[r]];
    }
    step.tokens = tokens.data(), step.positions = turns.data(), step.wanted = wanted.data();
    run_job(m, step, {0, count, 0, count, 0, count, 0, 0}, scratch);
    sample_rows(m, b, rows, positions, hidden, logits, drawn);
    int64_t kept = 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = rows[r], made = b.made[row]++, at = row * b.most + made;
      b.tokens[at] = drawn[r].token, b.logprobs[at] = drawn[r].logprob, b.entropies[at] = drawn[r].entropy;
      if (made + 1 == b.count[row] || b.stops_at(row, drawn[r].token)) continue;
      rows[kept] = row, tokens[kept] = drawn[r].token, positions[kept] = positions[r] + 1;
      ++kept;
    }
    rows.resize(kept);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> packed_decode(
    const Tensor& embedding, at::TensorList weights, const Tensor& norm, const Tensor& head, const Tensor& axis,
    const Tensor& cos, const Tensor& sin, Tensor& kv, const Tensor& rows_in, const Tensor& temperature_in,
    const Tensor& tables_in, const Tensor& stops_in, const Tensor& banned_in, double eps, double scale) {
  const Model m = model_of("packed_decode", embedding, weights, norm, axis, cos, sin, kv, eps, scale);
  TORCH_CHECK_VALUE(rows_in.dim() == 2 && rows_in.size(0) == 5 && temperature_in.dim() == 1 && tables_in.dim() == 2 &&
                        stops_in.dim() == 2 && temperature_in.size(0) == rows_in.size(1) &&
                        tables_in.size(0) == rows_in.size(1) && stops_in.size(0) == rows_in.size(1),
                    "packed_decode: rows ", rows_in.sizes(), ", temperature ", temperature_in.sizes(), ", tables ",
                    tables_in.sizes(), " and stops ", stops_in.sizes(), " must be [5, n], [n], [n, ..] and [n, ..]");
  TORCH_CHECK_VALUE(head.is_contiguous() && head.numel() >= embedding.numel() && head.size(1) == m.hidden &&
                        head.size(2) == kPanel,
                    "packed_decode: head ", head.sizes(), " must be the packed panels of ", embedding.sizes());
  const Tensor rows = rows_in.contiguous(), temperature = temperature_in.contiguous(), tables = tables_in.contiguous();
  const Tensor stops = stops_in.contiguous(), banned = banned_in.contiguous();
  const int64_t n = rows.size(1), *column = rows.const_data_ptr<int64_t>();
  Batch b{};
  b.head = head.const_data_ptr<float>(), b.vocabulary = embedding.size(0);
  b.banned = banned.const_data_ptr<int64_t>(), b.banned_count = banned.numel();
  b.token = column, b.position = column + n, b.delta = column + 2 * n, b.seed = column + 3 * n;
  b.count = column + 4 * n, b.stops = stops.const_data_ptr<int64_t>(), b.stop_columns = stops.size(1);
  b.temperature = temperature.const_data_ptr<float>();
  b.tables = tables.const_data_ptr<int32_t>(), b.columns = tables.size(1);
  b.kv = kv.mutable_data_ptr<float>(), b.plane = kv.stride(1), b.block_size = kv.size(4);
  for (int64_t i = 0; i < b.banned_count; ++i) {
    TORCH_CHECK_VALUE(b.banned[i] >= 0 && b.banned[i] < b.vocabulary, "packed_decode: banned[", i, "] = ", b.banned[i],
                      " is outside the vocabulary of ", b.vocabulary);
  }
  int64_t most_keys = 0;
  for (int64_t r = 0; r < n; ++r) {
    const int64_t keys = b.position[r] + b.count[r], used = (keys + b.block_size - 1) / b.block_size;
    TORCH_CHECK_INDEX(b.token[r] >= 0 && b.token[r] < b.vocabulary, "packed_decode: token ", b.token[r], " of row ", r,
                      " is outside the vocabulary of ", b.vocabulary);
    TORCH_CHECK_VALUE(b.position[r] >= 0 && b.count[r] >= 0 && used <= b.columns, "packed_decode: row ", r,
                      " stands at ", b.position[r], " and wants ", b.count[r], " tokens, with a table of ", b.columns,
                      " blocks");
    for (int64_t i = 0; i < used; ++i) {
      const int32_t block = b.tables[r * b.columns + i];
      TORCH_CHECK_VALUE(block >= 0 && block < kv.size(2), "packed_decode: tables[", r, ", ", i, "] = ", block,
                        " is outside the cache of ", kv.size(2), " blocks");
    }
    TORCH_CHECK_VALUE(b.temperature[r] >= 0.0f, "packed_decode: temperature[", r, "] = ", b.temperature[r],
                      " must be 0 (greedy) or above");
    b.most = std::max(b.most, b.count[r]), most_keys = std::max(most_keys, used * b.block_size);
  }
  const auto fp32 = temperature.options();
  Tensor tokens = at::empty({n, b.most}, rows.options()), made = at::empty({n}, rows.options());
  Tensor logprobs = at::empty({n, b.most}, fp32), entropies = at::empty({n, b.most}, fp32);
  b.tokens = tokens.mutable_data_ptr<int64_t>(), b.made = made.mutable_data_ptr<int64_t>();
  std::fill_n(b.made, n, 0);
  b.logprobs = logprobs.mutable_data_ptr<float>(), b.entropies = entropies.mutable_data_ptr<float>();
  if (n == 0) return {tokens, logprobs, entropies, made};
  const int64_t threads = std::max<int64_t>(1, at::get_num_threads());
  const int64_t jobs = std::min(n, threads * ((n + threads * kJobRows - 1) / (threads * kJobRows)));
  parallel_items(jobs, decode_scratch(m, b, (n + jobs - 1) / jobs, most_keys), [&](int64_t i, float* scratch) {
    decode_rows(m, b, i * n / jobs, (i + 1) * n / jobs, most_keys, scratch);
  });
  return {tokens, logprobs, entropies, made};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def(
      "packed_decode(Tensor embedding, Tensor[] weights, Tensor norm, Tensor head, Tensor axis, Tensor cos, Tensor sin, "
      "Tensor(a!) kv, Tensor rows, Tensor temperature, Tensor tables, Tensor stops, Tensor banned, float eps, "
      "float scale) -> (Tensor, Tensor, Tensor, Tensor)");
  m.impl("packed_decode", c10::DispatchKey::CPU, TORCH_FN(packed_decode));
}

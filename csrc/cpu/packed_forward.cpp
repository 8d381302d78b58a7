// All decoder layers of a small Qwen3 over the paged cache in one call. See kernels/packed.
//
// The work is cut by sequences, not by operators: a thread takes some neighbouring sequences through all layers by
// itself (packed_layers.h). How a step is cut changes no bit.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "attention.h"
#include "packed_layers.h"

namespace {
using namespace axpo;
using at::Tensor;
using std::optional;

constexpr int64_t kJobRows = 96;  // of a job, about: more would leave the cache, fewer would read the weights too often

// Cuts the step into jobs of similar size, as many as the threads or a multiple.
std::vector<Job> cut_jobs(const Step& step, int64_t threads) {
  const int64_t count = threads * ((step.rows + threads * kJobRows - 1) / (threads * kJobRows));
  std::vector<Job> jobs;
  const int64_t spans = static_cast<int64_t>(step.spans.size());
  Job job{};
  for (int64_t s = 0; s < spans; ++s) {
    job.row_end = step.spans[s].row + step.spans[s].tokens;
    job.span_end = s + 1;
    const int64_t made = static_cast<int64_t>(jobs.size()) + 1;
    if (s + 1 < spans && job.row_end * count < made * step.rows) continue;
    job.wanted_end = std::lower_bound(step.wanted, step.wanted + step.wanted_count, job.row_end) - step.wanted;
    job.image_end = std::lower_bound(step.image_rows, step.image_rows + step.image_count, job.row_end) - step.image_rows;
    jobs.push_back(job);
    job = {job.span_end, 0, job.row_end, 0, job.wanted_end, 0, job.image_end, 0};
  }
  return jobs;
}

void list_spans(Step& step, const Tensor& tables, const Tensor& cu_seqlens, const Tensor& context_lens,
                int64_t blocks) {
  const int32_t *starts = cu_seqlens.const_data_ptr<int32_t>(), *lengths = context_lens.const_data_ptr<int32_t>();
  const int32_t* table = tables.const_data_ptr<int32_t>();
  const int64_t sequences = context_lens.numel(), columns = tables.size(1);
  TORCH_CHECK_VALUE(starts[0] == 0 && starts[sequences] == step.rows, "packed_forward: cu_seqlens runs from ",
                    starts[0], " to ", starts[sequences], ", but there are ", step.rows, " tokens");
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t tokens = starts[s + 1] - starts[s], used = (lengths[s] + step.block_size - 1) / step.block_size;
    if (tokens == 0) continue;
    TORCH_CHECK_VALUE(tokens > 0 && lengths[s] >= tokens && used <= columns, "packed_forward: sequence ", s, " has ",
                      tokens, " tokens, ", lengths[s], " keys and a table of ", columns, " blocks");
    const Span span{starts[s], tokens, lengths[s], table + s * columns};
    for (int64_t b = 0; b < used; ++b) {
      TORCH_CHECK_VALUE(span.blocks[b] >= 0 && span.blocks[b] < blocks, "packed_forward: tables[", s, ", ", b, "] = ",
                        span.blocks[b], " is outside the cache of ", blocks, " blocks");
    }
    step.spans.push_back(span);
    step.most_keys = std::max<int64_t>(step.most_keys, used * step.block_size);
  }
  for (int64_t w = 0; w < step.wanted_count; ++w) {
    TORCH_CHECK_INDEX(step.wanted[w] >= 0 && step.wanted[w] < step.rows && (w == 0 || step.wanted[w - 1] < step.wanted[w]),
                      "packed_forward: wanted[", w, "] = ", step.wanted[w], " is not an ascending row");
  }
  for (int64_t i = 0; i < step.image_count; ++i) {
    TORCH_CHECK_INDEX(step.image_rows[i] >= 0 && step.image_rows[i] < step.rows &&
                          (i == 0 || step.image_rows[i - 1] < step.image_rows[i]),
                      "packed_forward: image_rows[", i, "] = ", step.image_rows[i], " is not an ascending row");
  }
}

Tensor packed_forward(const Tensor& tokens, const Tensor& positions, const Tensor& embedding, at::TensorList weights,
                      const Tensor& norm, const Tensor& axis, const Tensor& cos, const Tensor& sin, Tensor& kv,
                      const Tensor& slots, const optional<Tensor>& writes, const Tensor& tables,
                      const Tensor& cu_seqlens, const Tensor& context_lens, const Tensor& wanted,
                      const optional<Tensor>& image_rows, at::TensorList features, double eps, double scale) {
  const Model m = model_of("packed_forward", embedding, weights, norm, axis, cos, sin, kv, eps, scale);
  Step step{};
  const Tensor ids = tokens.contiguous(), where = positions.contiguous(), slots_c = slots.contiguous();
  const Tensor tables_c = tables.contiguous(), starts = cu_seqlens.contiguous(), lengths = context_lens.contiguous();
  const Tensor wanted_c = wanted.contiguous(), images = image_rows ? image_rows->contiguous() : Tensor();
  const Tensor writes_c = writes ? writes->contiguous() : Tensor();
  step.rows = ids.numel();
  step.tokens = ids.const_data_ptr<int64_t>(), step.positions = where.const_data_ptr<int64_t>();
  step.wanted = wanted_c.const_data_ptr<int64_t>(), step.wanted_count = wanted_c.numel();
  step.image_rows = image_rows ? images.const_data_ptr<int64_t>() : nullptr;
  step.image_count = image_rows ? images.numel() : 0;
  for (int64_t r = 0; r < step.rows; ++r) {
    TORCH_CHECK_INDEX(step.tokens[r] >= 0 && step.tokens[r] < embedding.size(0), "packed_forward: token ",
                      step.tokens[r], " of row ", r, " is outside the vocabulary of ", embedding.size(0));
  }
  std::vector<Tensor> levels;
  for (const Tensor& level : features) {
    TORCH_CHECK_VALUE(level.size(0) == step.image_count && level.size(1) == m.hidden, "packed_forward: features ",
                      level.sizes(), " for ", step.image_count, " image rows of ", m.hidden);
    levels.push_back(level.contiguous());
    step.features.push_back(levels.back().const_data_ptr<float>());
  }
  step.kv = kv.mutable_data_ptr<float>(), step.block_size = kv.size(4), step.plane = kv.stride(1);
  const int64_t slot_total = kv.size(2) * step.block_size, *slot = slots_c.const_data_ptr<int64_t>();
  step.slots.assign(step.rows, -1);
  for (int64_t i = 0; i < slots_c.numel(); ++i) {
    TORCH_CHECK_INDEX(slot[i] >= 0 && slot[i] < slot_total, "packed_forward: slot ", slot[i],
                      " is outside the cache of ", slot_total, " slots");
    step.slots.at(writes ? writes_c.const_data_ptr<int64_t>()[i] : i) = slot[i];
  }
  list_spans(step, tables_c, starts, lengths, kv.size(2));
  Tensor out = at::empty({step.wanted_count, m.hidden}, embedding.options());
  step.out = out.mutable_data_ptr<float>();
  const std::vector<Job> jobs = cut_jobs(step, at::get_num_threads());
  int64_t most = 0;
  for (const Job& job : jobs) most = std::max(most, job.row_end - job.row);
  parallel_items(static_cast<int64_t>(jobs.size()), job_scratch(m, most, step.most_keys),
                 [&](int64_t i, float* scratch) { run_job(m, step, jobs[i], scratch); });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def(
      "packed_forward(Tensor tokens, Tensor positions, Tensor embedding, Tensor[] weights, Tensor norm, Tensor axis, "
      "Tensor cos, Tensor sin, Tensor(a!) kv, Tensor slots, Tensor? writes, Tensor tables, Tensor cu_seqlens, "
      "Tensor context_lens, Tensor wanted, Tensor? image_rows, Tensor[] features, float eps, float scale) "
      "-> Tensor");
  m.impl("packed_forward", c10::DispatchKey::CPU, TORCH_FN(packed_forward));
}

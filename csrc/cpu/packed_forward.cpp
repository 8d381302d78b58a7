// All decoder layers of a small Qwen3 over the paged cache in one call. See kernels/packed.
//
// The work is cut by sequences, not by operators: a thread takes some neighbouring sequences through all layers by
// itself, so there is no barrier, and activations stay in its core's cache. A row's result does not depend on which
// other rows are there (panels.h, paged_attention.cpp), so neither does it on how a step is cut.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "packed_rows.h"
#include "paged_plan.h"
#include "panels.h"

namespace {
using namespace axpo;
using at::Tensor;
using std::optional;

constexpr int64_t kJobRows = 96;  // of a job, about: more would leave the cache, fewer would read the weights too often
constexpr int kWeights = 9;       // tensors of a layer

struct Layer {
  const float *input_norm, *q, *kv, *q_norm, *k_norm, *o, *post_norm, *gate_up, *down;
};

struct Model {
  std::vector<Layer> layers;
  const float *embedding, *norm, *cos, *sin;
  const int64_t* axis;  // which of a token's three positions turns each pair of a head
  int64_t hidden, q_heads, kv_heads, dim, inner, angles;
  float eps, scale;

  int64_t q_width() const { return q_heads * dim; }
  int64_t kv_width() const { return 2 * kv_heads * dim; }
};

// A step: `features` replace the embeddings of rows `image_rows`, and what follows is added behind the first layers.
struct Step {
  const int64_t *tokens, *positions, *wanted, *image_rows;
  int64_t rows, wanted_count, image_count;
  std::vector<int64_t> slots;  // of every row, -1 where its KV is there already
  std::vector<const float*> features;
  std::vector<Span> spans;
  float* kv;
  int64_t plane, block_size;  // floats of a layer's keys
  float* out;
};

// Neighbouring sequences: spans, rows, wanted rows and image rows as [begin, end).
struct Job {
  int64_t span, span_end, row, row_end, wanted, wanted_end, image, image_end;
};

AXPO_CLONES void norm_rows(const float* x, const float* w, float* y, int64_t rows, int64_t n, float eps) {
  for (int64_t r = 0; r < rows; ++r) rms_row(x + r * n, w, y + r * n, n, eps);
}

// Of the first `heads` heads of each row: norm, then rotation. angles: [rows][dim], cosines before sines.
AXPO_CLONES void turn_rows(float* x, int64_t stride, const float* w, const float* angles, int64_t rows, int64_t heads,
                           int64_t dim, float eps) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t h = 0; h < heads; ++h) {
      float* head = x + r * stride + h * dim;
      rms_row(head, w, head, dim, eps);
      rotate_head(head, angles + r * dim, angles + r * dim + dim / 2, dim / 2);
    }
  }
}

AXPO_CLONES void add_rows(const float* x, float* to, int64_t n) { add_row(x, to, n); }

void find_angles(const Model& m, const Step& step, int64_t row, float* to) {
  const int64_t half = m.dim / 2;
  int64_t at[3];
  for (int64_t a = 0; a < 3; ++a) {
    at[a] = step.positions[a * step.rows + row];
    TORCH_CHECK_INDEX(at[a] >= 0 && at[a] < m.angles, "packed_forward: position ", at[a], " of row ", row,
                      " is outside the table of ", m.angles);
  }
  for (int64_t i = 0; i < half; ++i) {
    to[i] = m.cos[at[m.axis[i]] * half + i];
    to[half + i] = m.sin[at[m.axis[i]] * half + i];
  }
}

// One job's memory.
struct Work {
  float *x, *y, *q, *kv, *act, *angles, *attention;
  static int64_t size(const Model& m, int64_t rows) {
    return rows * (2 * m.hidden + m.q_width() + m.kv_width() + m.inner + m.dim) +
           scratch_size(m.q_heads / m.kv_heads, m.dim) + 16 * 7;
  }
  Work(const Model& m, int64_t rows, float* at) {
    const auto take = [&at](int64_t count) {
      float* p = at;
      at += (count + 15) / 16 * 16;
      return p;
    };
    x = take(rows * m.hidden), y = take(rows * m.hidden), q = take(rows * m.q_width());
    kv = take(rows * m.kv_width()), act = take(rows * m.inner), angles = take(rows * m.dim);
    attention = at;
  }
};

void write_kv(const Model& m, const Step& step, int64_t layer, int64_t row, int64_t rows, const float* kv) {
  float *keys = step.kv + 2 * layer * step.plane, *values = keys + step.plane;
  const size_t bytes = m.dim * sizeof(float);
  for (int64_t r = 0; r < rows; ++r, kv += m.kv_width()) {
    const int64_t slot = step.slots[row + r];
    if (slot < 0) continue;
    const int64_t block = slot / step.block_size, offset = slot % step.block_size;
    for (int64_t h = 0; h < m.kv_heads; ++h) {
      const int64_t to = ((block * m.kv_heads + h) * step.block_size + offset) * m.dim;
      std::memcpy(keys + to, kv + h * m.dim, bytes);
      std::memcpy(values + to, kv + (m.kv_heads + h) * m.dim, bytes);
    }
  }
}

// Adds rows of features to those rows of x that hold image tokens; row_of: the step's row of each row of x.
void add_features(const Model& m, const Step& step, const Job& job, int64_t level, const int64_t* row_of, int64_t rows,
                  float* x) {
  if (level >= static_cast<int64_t>(step.features.size())) return;
  int64_t r = 0;
  for (int64_t i = job.image; i < job.image_end; ++i) {
    while (r < rows && row_of[r] < step.image_rows[i]) ++r;
    if (r == rows) return;
    if (row_of[r] == step.image_rows[i]) add_rows(step.features[level] + i * m.hidden, x + r * m.hidden, m.hidden);
  }
}

void run_job(const Model& m, const Step& step, const Job& job, float* scratch) {
  int64_t rows = job.row_end - job.row;
  const Work work(m, rows, scratch);
  const int64_t hidden = m.hidden, q_width = m.q_width(), kv_width = m.kv_width(), group = m.q_heads / m.kv_heads;
  std::vector<int64_t> row_of(rows);
  for (int64_t r = 0; r < rows; ++r) {
    row_of[r] = job.row + r;
    std::memcpy(work.x + r * hidden, m.embedding + step.tokens[job.row + r] * hidden, hidden * sizeof(float));
    find_angles(m, step, job.row + r, work.angles + r * m.dim);
  }
  for (int64_t i = job.image; i < job.image_end; ++i) {
    std::memcpy(work.x + (step.image_rows[i] - job.row) * hidden, step.features[0] + i * hidden,
                hidden * sizeof(float));
  }
  std::vector<Span> spans(step.spans.begin() + job.span, step.spans.begin() + job.span_end);
  for (Span& span : spans) span.row -= job.row;
  spans[0].shared = 0;
  const auto cut = [&] {
    return cut_tiles(spans.data(), static_cast<int64_t>(spans.size()), m.kv_heads, group, m.dim, step.block_size,
                     q_width, rows);
  };
  Tiles tiles = cut();

  const int64_t last = static_cast<int64_t>(m.layers.size()) - 1;
  for (int64_t l = 0; l <= last; ++l) {
    const Layer& w = m.layers[l];
    norm_rows(work.x, w.input_norm, work.y, rows, hidden, m.eps);
    product({work.y, hidden, rows, hidden, w.kv, nullptr, kv_width, work.kv, kv_width, Then::kStore});
    turn_rows(work.kv, kv_width, w.k_norm, work.angles, rows, m.kv_heads, m.dim, m.eps);
    write_kv(m, step, l, job.row, rows, work.kv);
    if (l == last) {  // from here on only the rows whose output is wanted
      rows = 0;
      std::vector<Span> ends;
      int64_t shared = 0;
      for (const Span& span : spans) {
        const int64_t from = span.row + span.tokens - 1;
        shared = std::min(shared, span.shared);
        if (job.wanted + rows == job.wanted_end || step.wanted[job.wanted + rows] != job.row + from) continue;
        ends.push_back({rows, 1, span.keys, span.blocks, shared});
        shared = std::numeric_limits<int64_t>::max();
        if (rows != from) {
          std::memcpy(work.x + rows * hidden, work.x + from * hidden, hidden * sizeof(float));
          std::memcpy(work.y + rows * hidden, work.y + from * hidden, hidden * sizeof(float));
          std::memcpy(work.angles + rows * m.dim, work.angles + from * m.dim, m.dim * sizeof(float));
          row_of[rows] = row_of[from];
        }
        ++rows;
      }
      TORCH_CHECK_VALUE(job.wanted + rows == job.wanted_end, "packed_forward: a wanted row is not its sequence's last");
      if (rows == 0) return;
      spans = std::move(ends);
      tiles = cut();
    }
    product({work.y, hidden, rows, hidden, w.q, nullptr, q_width, work.q, q_width, Then::kStore});
    turn_rows(work.q, q_width, w.q_norm, work.angles, rows, m.q_heads, m.dim, m.eps);
    const float* keys = step.kv + 2 * l * step.plane;
    // A tile reads its queries before it writes, so its output may take their place.
    const Cache<float> cache{work.q,     keys,  keys + step.plane, work.q, m.kv_heads * step.block_size * m.dim,
                             step.block_size, m.dim, group,             q_width, m.scale};
    attend_tiles(tiles.tiles.data(), tiles.tiles.data() + tiles.tiles.size(), cache, work.attention);
    product({work.q, q_width, rows, q_width, w.o, nullptr, hidden, work.x, hidden, Then::kAdd});
    norm_rows(work.x, w.post_norm, work.y, rows, hidden, m.eps);
    product({work.y, hidden, rows, hidden, w.gate_up, nullptr, 2 * m.inner, work.act, m.inner, Then::kSwiglu});
    product({work.act, m.inner, rows, m.inner, w.down, nullptr, hidden, work.x, hidden, Then::kAdd});
    add_features(m, step, job, l + 1, row_of.data(), rows, work.x);
  }
  norm_rows(work.x, m.norm, step.out + job.wanted * hidden, rows, hidden, m.eps);
}

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

Model model_of(const Tensor& embedding, at::TensorList weights, const Tensor& norm, const Tensor& axis,
               const Tensor& cos, const Tensor& sin, const Tensor& kv, double eps, double scale) {
  TORCH_CHECK_VALUE(!weights.empty() && weights.size() % kWeights == 0, "packed_forward: ", weights.size(),
                    " weights: it takes ", kWeights, " a layer");
  Model m;
  for (size_t i = 0; i < weights.size(); i += kWeights) {
    const auto at = [&](int j) {
      TORCH_CHECK_VALUE(weights[i + j].is_contiguous(), "packed_forward: weight ", i + j, " must be contiguous");
      return weights[i + j].const_data_ptr<float>();
    };
    m.layers.push_back({at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)});
  }
  for (const Tensor* t : {&embedding, &norm, &axis, &cos, &sin, &kv}) {
    TORCH_CHECK_VALUE(t->is_contiguous(), "packed_forward: a tensor of shape ", t->sizes(), " must be contiguous");
  }
  m.embedding = embedding.const_data_ptr<float>(), m.norm = norm.const_data_ptr<float>();
  m.cos = cos.const_data_ptr<float>(), m.sin = sin.const_data_ptr<float>(), m.axis = axis.const_data_ptr<int64_t>();
  m.hidden = embedding.size(1), m.dim = kv.size(5), m.kv_heads = kv.size(3), m.angles = cos.size(0);
  m.inner = weights[8].size(1), m.q_heads = weights[5].size(1) / m.dim;
  m.eps = static_cast<float>(eps), m.scale = static_cast<float>(scale);
  TORCH_CHECK_VALUE(kv.size(0) == static_cast<int64_t>(m.layers.size()), "packed_forward: the cache has ", kv.size(0),
                    " layers, the model ", m.layers.size());
  TORCH_CHECK_VALUE(m.hidden % 16 == 0 && m.inner % 16 == 0 && m.dim % 16 == 0 && m.dim <= 256,
                    "packed_forward: hidden ", m.hidden, ", intermediate ", m.inner, " and head size ", m.dim,
                    " must be multiples of 16");
  return m;
}

Tensor packed_forward(const Tensor& tokens, const Tensor& positions, const Tensor& embedding, at::TensorList weights,
                      const Tensor& norm, const Tensor& axis, const Tensor& cos, const Tensor& sin, Tensor& kv,
                      const Tensor& slots, const optional<Tensor>& writes, const Tensor& tables,
                      const Tensor& cu_seqlens, const Tensor& context_lens, const Tensor& wanted,
                      const optional<Tensor>& image_rows, at::TensorList features, double eps, double scale,
                      bool share) {
  const Model m = model_of(embedding, weights, norm, axis, cos, sin, kv, eps, scale);
  Step step;
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
  step.spans = list_spans(tables_c, starts, lengths, step.rows, kv.size(2), step.block_size, share);
  Tensor out = at::empty({step.wanted_count, m.hidden}, embedding.options());
  step.out = out.mutable_data_ptr<float>();
  const std::vector<Job> jobs = cut_jobs(step, at::get_num_threads());
  int64_t most = 0;
  for (const Job& job : jobs) most = std::max(most, job.row_end - job.row);
  parallel_items(static_cast<int64_t>(jobs.size()), Work::size(m, most),
                 [&](int64_t i, float* scratch) { run_job(m, step, jobs[i], scratch); });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def(
      "packed_forward(Tensor tokens, Tensor positions, Tensor embedding, Tensor[] weights, Tensor norm, Tensor axis, "
      "Tensor cos, Tensor sin, Tensor(a!) kv, Tensor slots, Tensor? writes, Tensor tables, Tensor cu_seqlens, "
      "Tensor context_lens, Tensor wanted, Tensor? image_rows, Tensor[] features, float eps, float scale, "
      "bool share=True) -> Tensor");
  m.impl("packed_forward", c10::DispatchKey::CPU, TORCH_FN(packed_forward));
}

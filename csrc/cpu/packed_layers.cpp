// The layers of a small Qwen3. See packed_layers.h.
//
// Neighbouring sequences go through all layers on one thread, so there is no barrier, and activations stay in its core's
// cache. A row's result does not depend on which other rows are there (panels.h, packed_attention.h).
#include "packed_layers.h"

#include "attention.h"
#include "packed_attention.h"
#include "panels.h"

namespace {
using namespace axpo;
using at::Tensor;

constexpr int kWeights = 9;  // tensors of a layer

// One job's memory.
struct Work {
  float *x, *y, *q, *kv, *act, *angles, *scores;
  static int64_t size(const Model& m, int64_t rows, int64_t keys) {
    return rows * (2 * m.hidden + m.q_width() + m.kv_width() + m.inner + m.dim) +
           4 * keys + 16 * 8;
  }
  Work(const Model& m, int64_t rows, float* at) {
    const auto take = [&at](int64_t count) {
      float* p = at;
      at += (count + 15) / 16 * 16;
      return p;
    };
    x = take(rows * m.hidden), y = take(rows * m.hidden), q = take(rows * m.q_width());
    kv = take(rows * m.kv_width()), act = take(rows * m.inner), angles = take(rows * m.dim);
    scores = at;
  }
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

// Keys go [Hk][D][block_size], values [Hk][block_size][D] into a block.
void write_kv(const Model& m, const Step& step, int64_t layer, int64_t row, int64_t rows, const float* kv) {
  float *keys = step.kv + 2 * layer * step.plane, *values = keys + step.plane;
  const int64_t size = step.block_size;
  for (int64_t r = 0; r < rows; ++r, kv += m.kv_width()) {
    const int64_t slot = step.slots[row + r];
    if (slot < 0) continue;
    const int64_t block = slot / size, offset = slot % size;
    for (int64_t h = 0; h < m.kv_heads; ++h) {
      const int64_t head = (block * m.kv_heads + h) * size * m.dim;
      const float* key = kv + h * m.dim;
      for (int64_t d = 0; d < m.dim; ++d) keys[head + d * size + offset] = key[d];
      std::memcpy(values + head + offset * m.dim, key + m.kv_heads * m.dim, m.dim * sizeof(float));
    }
  }
}

void find_shared(std::vector<Context>& contexts, int64_t rows, int64_t block_size) {
  for (int64_t r = 0; r + 1 < rows; ++r) {
    const Context &a = contexts[r], &b = contexts[r + 1];
    const int64_t most = std::min(a.keys, b.keys) / block_size;
    contexts[r].shared = std::mismatch(a.blocks, a.blocks + most, b.blocks).first - a.blocks;
  }
}

// Replaces the queries of some rows, [rows][q_heads][dim], by what they attend to. Head after head, as what the rows
// share of one head's keys and values stays in the core's first cache.
void attend_rows(const Model& m, const Step& step, int64_t layer, const Context* contexts, int64_t rows, float* q,
                 float* scores, int64_t stride) {
  const float* keys = step.kv + 2 * layer * step.plane;
  const int64_t group = m.q_heads / m.kv_heads, head_size = step.block_size * m.dim;
  const float factor = m.scale * kLog2e;
  for (int64_t h = 0; h < m.kv_heads; ++h) {
    const Plane plane{keys + h * head_size, keys + step.plane + h * head_size, m.kv_heads * head_size, step.block_size,
                      m.dim};
    for (int64_t r = 0; r < rows; r += 2) {
      const int64_t tokens = std::min<int64_t>(2, rows - r);
      for (int64_t g = 0; g < group; g += 2) {
        attend(tokens, std::min<int64_t>(2, group - g), q + r * m.q_width() + (h * group + g) * m.dim, m.q_width(), plane,
               contexts + r, factor, scores, stride);
      }
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

}  // namespace

int64_t axpo::job_scratch(const Model& m, int64_t rows, int64_t most_keys) { return Work::size(m, rows, most_keys); }

void axpo::run_job(const Model& m, const Step& step, const Job& job, float* scratch) {
  int64_t rows = job.row_end - job.row;
  const Work work(m, rows, scratch);
  const int64_t hidden = m.hidden, q_width = m.q_width(), kv_width = m.kv_width();
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
  std::vector<Context> contexts;
  for (int64_t i = job.span; i < job.span_end; ++i) {
    const Span& span = step.spans[i];
    for (int64_t t = 1; t <= span.tokens; ++t) contexts.push_back({span.blocks, span.keys - span.tokens + t, 0});
  }

  find_shared(contexts, rows, step.block_size);

  const int64_t last = static_cast<int64_t>(m.layers.size()) - 1;
  for (int64_t l = 0; l <= last; ++l) {
    const Layer& w = m.layers[l];
    norm_rows(work.x, w.input_norm, work.y, rows, hidden, m.eps);
    product({work.y, hidden, rows, hidden, w.kv, nullptr, kv_width, work.kv, kv_width, Then::kStore});
    turn_rows(work.kv, kv_width, w.k_norm, work.angles, rows, m.kv_heads, m.dim, m.eps);
    write_kv(m, step, l, job.row, rows, work.kv);
    if (l == last) {  // from here on only the rows whose output is wanted
      rows = job.wanted_end - job.wanted;
      if (rows == 0) return;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t from = step.wanted[job.wanted + r] - job.row;
        std::memmove(work.x + r * hidden, work.x + from * hidden, hidden * sizeof(float));
        std::memmove(work.y + r * hidden, work.y + from * hidden, hidden * sizeof(float));
        std::memmove(work.angles + r * m.dim, work.angles + from * m.dim, m.dim * sizeof(float));
        row_of[r] = row_of[from];
        contexts[r] = contexts[from];
      }
      find_shared(contexts, rows, step.block_size);
    }
    product({work.y, hidden, rows, hidden, w.q, nullptr, q_width, work.q, q_width, Then::kStore});
    turn_rows(work.q, q_width, w.q_norm, work.angles, rows, m.q_heads, m.dim, m.eps);
    attend_rows(m, step, l, contexts.data(), rows, work.q, work.scores, step.most_keys);
    product({work.q, q_width, rows, q_width, w.o, nullptr, hidden, work.x, hidden, Then::kAdd});
    norm_rows(work.x, w.post_norm, work.y, rows, hidden, m.eps);
    product({work.y, hidden, rows, hidden, w.gate_up, nullptr, 2 * m.inner, work.act, m.inner, Then::kSwiglu});
    product({work.act, m.inner, rows, m.inner, w.down, nullptr, hidden, work.x, hidden, Then::kAdd});
    add_features(m, step, job, l + 1, row_of.data(), rows, work.x);
  }
  norm_rows(work.x, m.norm, step.out + job.wanted * hidden, rows, hidden, m.eps);
}

Model axpo::model_of(const char* name, const Tensor& embedding, at::TensorList weights, const Tensor& norm,
                     const Tensor& axis, const Tensor& cos, const Tensor& sin, const Tensor& kv, double eps,
                     double scale) {
  TORCH_CHECK_VALUE(!weights.empty() && weights.size() % kWeights == 0, name, ": ", weights.size(),
                    " weights: it takes ", kWeights, " a layer");
  Model m;
  for (size_t i = 0; i < weights.size(); i += kWeights) {
    const auto at = [&](int j) {
      TORCH_CHECK_VALUE(weights[i + j].is_contiguous(), name, ": weight ", i + j, " must be contiguous");
      return weights[i + j].const_data_ptr<float>();
    };
    m.layers.push_back({at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)});
  }
  for (const Tensor* t : {&embedding, &norm, &axis, &cos, &sin, &kv}) {
    TORCH_CHECK_VALUE(t->is_contiguous(), name, ": a tensor of shape ", t->sizes(), " must be contiguous");
  }
  m.embedding = embedding.const_data_ptr<float>(), m.norm = norm.const_data_ptr<float>();
  m.cos = cos.const_data_ptr<float>(), m.sin = sin.const_data_ptr<float>(), m.axis = axis.const_data_ptr<int64_t>();
  m.hidden = embedding.size(1), m.dim = kv.size(5), m.kv_heads = kv.size(3), m.angles = cos.size(0);
  m.inner = weights[8].size(1), m.q_heads = weights[5].size(1) / m.dim;
  m.eps = static_cast<float>(eps), m.scale = static_cast<float>(scale);
  TORCH_CHECK_VALUE(kv.size(0) == static_cast<int64_t>(m.layers.size()), name, ": the cache has ", kv.size(0),
                    " layers, the model ", m.layers.size());
  TORCH_CHECK_VALUE(m.hidden % 16 == 0 && m.inner % 16 == 0 && m.dim % 16 == 0 && m.dim <= kMostDim &&
                        kv.size(4) % kChunk == 0,
                    name, ": hidden ", m.hidden, ", intermediate ", m.inner, ", head size ", m.dim,
                    " and block size ", kv.size(4), " must be multiples of 16");
  return m;
}

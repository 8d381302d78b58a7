// The layers of a small Qwen3 over the paged cache, for some neighbouring sequences on the calling thread. See
// packed_layers.cpp, and packed_forward.cpp and packed_decode.cpp, which call them.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace axpo {

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
struct Span {
  int64_t row, tokens, keys;  // first row, queries, keys that the last one sees
  const int32_t* blocks;
};

struct Step {
  const int64_t *tokens, *positions, *wanted, *image_rows;
  int64_t rows, wanted_count, image_count;
  std::vector<int64_t> slots;  // of every row, -1 where its KV is there already
  std::vector<const float*> features;
  std::vector<Span> spans;
  float* kv;
  int64_t plane, block_size, most_keys;  // plane: floats of a layer's keys; most_keys: of a sequence, padded
  float* out;
};

// Neighbouring sequences: spans, rows, wanted rows and image rows as [begin, end).
struct Job {
  int64_t span, span_end, row, row_end, wanted, wanted_end, image, image_end;
};

// Checks and takes apart what kernels/packed describes. `name`: of the operator, for its messages.
Model model_of(const char* name, const at::Tensor& embedding, at::TensorList weights, const at::Tensor& norm,
               const at::Tensor& axis, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& kv, double eps,
               double scale);

// Floats of memory that run_job needs for so many rows and keys of a sequence.
int64_t job_scratch(const Model& m, int64_t rows, int64_t most_keys);

// Takes a job's rows through all layers; the wanted ones' hidden states go to step.out.
void run_job(const Model& m, const Step& step, const Job& job, float* scratch);

}  // namespace axpo

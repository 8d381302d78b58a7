// Qwen3-VL's vision tower for small models in one call: a thread takes an image through all blocks by itself.
// See kernels/packed.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "attention.h"
#include "packed_rows.h"
#include "panels.h"

namespace {
using namespace axpo;
using at::Tensor;

constexpr int64_t kQueries = 64;  // whose scores exist at a time

struct Linear {
  const float *panels, *bias;
  int64_t inner, columns;
};
struct Norm {
  const float *weight, *bias;
};
struct Block {
  Norm norm1, norm2;
  Linear qkv, proj, fc1, fc2;
};
struct Merger {
  Norm norm;
  Linear fc1, fc2;
};

struct Tower {
  Linear patch;
  std::vector<Block> blocks;
  std::vector<Merger> mergers;  // the last one's output replaces embeddings, the others' are DeepStack's
  std::vector<int64_t> levels;  // after which block each of the others reads
  int64_t hidden, heads, unit;  // unit: patches of a token
  float eps;

  int64_t dim() const { return hidden / heads; }
};

// An image's frame: its patches, what depends on its size alone, and where its tokens' features go.
struct Frame {
  const float *pixels, *positions, *cos, *sin;
  int64_t patches, token;
};

AXPO_CLONES void norm_rows(const float* x, const Norm& norm, float* y, int64_t rows, int64_t n, float eps) {
  for (int64_t r = 0; r < rows; ++r) layer_norm_row(x + r * n, norm.weight, norm.bias, y + r * n, n, eps);
}

AXPO_CLONES void add_rows(const float* x, float* to, int64_t n) { add_row(x, to, n); }

// Rotates one head of every row, the two halves against each other.
AXPO_CLONES void rotate_rows(float* x, int64_t stride, const float* cos, const float* sin, int64_t rows, int64_t half) {
  for (int64_t r = 0; r < rows; ++r, x += stride, cos += half, sin += half) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[half + i];
      x[i] = a * cos[i] - b * sin[i];
      x[half + i] = b * cos[i] + a * sin[i];
    }
  }
}

// Rows of a head as the panels of a product that they are the weight of, [count / 32][dim][32]; the last one padded.
AXPO_CLONES void pack_keys(const float* x, int64_t stride, int64_t count, int64_t dim, float* panels) {
  for (int64_t first = 0; first < count; first += kPanel, panels += dim * kPanel) {
    const int64_t here = std::min(kPanel, count - first);
    if (here < kPanel) std::memset(panels, 0, dim * kPanel * sizeof(float));
    for (int64_t j = 0; j < here; ++j) {
      for (int64_t d = 0; d < dim; ++d) panels[d * kPanel + j] = x[(first + j) * stride + d];
    }
  }
}

// The same of their transpose, [dim / 32][count][32].
AXPO_CLONES void pack_values(const float* x, int64_t stride, int64_t count, int64_t dim, float* panels) {
  for (int64_t first = 0; first < dim; first += kPanel) {
    const int64_t here = std::min(kPanel, dim - first);
    for (int64_t r = 0; r < count; ++r, panels += kPanel) {
      std::memcpy(panels, x + r * stride + first, here * sizeof(float));
      std::memset(panels + here, 0, (kPanel - here) * sizeof(float));
    }
  }
}

// Each row of scores, `count` long, becomes its softmax; `stride` has room for whole vectors.
AXPO_CLONES void softmax_rows(float* scores, int64_t stride, int64_t rows, int64_t count, float scale) {
  for (int64_t r = 0; r < rows; ++r, scores += stride) {
    for (int64_t j = count; j % 16 != 0; ++j) scores[j] = -std::numeric_limits<float>::infinity();
    f32x16 top = load16(scores);
    for (int64_t j = 16; j < count; j += 16) top = top > load16(scores + j) ? top : load16(scores + j);
    const f32x16 peak = splat16(hmax16(top)), factor = splat16(scale);
    f32x16 sum = {};
    for (int64_t j = 0; j < count; j += 16) {
      const f32x16 w = exp16((load16(scores + j) - peak) * factor);
      store16(scores + j, w);
      sum += w;
    }
    const f32x16 inverse = splat16(1.0f / sum16(sum));
    for (int64_t j = 0; j < count; j += 16) store16(scores + j, load16(scores + j) * inverse);
  }
}

int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

// One frame's memory.
struct Work {
  float *x, *y, *qkv, *act, *keys, *values, *scores;
  static int64_t widest(const Tower& t) {
    int64_t most = t.hidden;
    for (const Block& b : t.blocks) most = std::max(most, b.fc1.columns);
    for (const Merger& m : t.mergers) most = std::max(most, m.fc1.columns);
    return most;
  }
  static int64_t size(const Tower& t, int64_t patches) {
    return patches * (5 * t.hidden + widest(t)) + padded(patches) * (t.dim() + kQueries) + padded(t.dim()) * patches +
           16 * 7;
  }
  Work(const Tower& t, int64_t patches, float* at) {
    const auto take = [&at](int64_t count) {
      float* p = at;
      at += (count + 15) / 16 * 16;
      return p;
    };
    x = take(patches * t.hidden), y = take(patches * t.hidden), qkv = take(3 * patches * t.hidden);
    act = take(patches * widest(t)), keys = take(padded(patches) * t.dim()), values = take(padded(t.dim()) * patches);
    scores = take(padded(patches) * kQueries);
  }
};

void apply(const Linear& w, const float* x, int64_t rows, float* out, Then then) {
  product({x, w.inner, rows, w.inner, w.panels, w.bias, w.columns, out, w.columns, then});
}

// Every patch attends to all of its frame. qkv: [P, 3, heads, dim]; y: [P, hidden].
void attend(const Tower& t, const Frame& frame, const Work& work) {
  const int64_t count = frame.patches, dim = t.dim(), stride = 3 * t.hidden, wide = padded(count);
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  for (int64_t h = 0; h < t.heads; ++h) {
    float *q = work.qkv + h * dim, *k = q + t.hidden, *v = k + t.hidden;
    rotate_rows(q, stride, frame.cos, frame.sin, count, dim / 2);
    rotate_rows(k, stride, frame.cos, frame.sin, count, dim / 2);
    pack_keys(k, stride, count, dim, work.keys);
    pack_values(v, stride, count, dim, work.values);
    for (int64_t r = 0; r < count; r += kQueries) {
      const int64_t rows = std::min(kQueries, count - r);
      product({q + r * stride, stride, rows, dim, work.keys, nullptr, wide, work.scores, wide, Then::kStore});
      softmax_rows(work.scores, wide, rows, count, scale);
      product({work.scores, wide, rows, count, work.values, nullptr, dim, work.y + r * t.hidden + h * dim, t.hidden,
               Then::kStore});
    }
  }
}

// Features of a frame's tokens. whole: the norm is over a token's patches together, not over each.
void merge(const Tower& t, const Merger& m, const Work& work, int64_t patches, bool whole, float* out) {
  const int64_t tokens = patches / t.unit, merged = t.hidden * t.unit;
  norm_rows(work.x, m.norm, work.y, whole ? tokens : patches, whole ? merged : t.hidden, t.eps);
  apply(m.fc1, work.y, tokens, work.act, Then::kGelu);
  apply(m.fc2, work.act, tokens, out, Then::kStore);
}

// out: [mergers][tokens][columns], the embeddings first.
void encode(const Tower& t, const Frame& frame, float* scratch, float* out, int64_t plane) {
  const Work work(t, frame.patches, scratch);
  const int64_t rows = frame.patches, last = static_cast<int64_t>(t.levels.size());
  out += frame.token * t.mergers[0].fc2.columns;
  apply(t.patch, frame.pixels, rows, work.x, Then::kStore);
  add_rows(frame.positions, work.x, rows * t.hidden);
  int64_t level = 0;
  for (size_t b = 0; b < t.blocks.size(); ++b) {
    const Block& block = t.blocks[b];
    norm_rows(work.x, block.norm1, work.y, rows, t.hidden, t.eps);
    apply(block.qkv, work.y, rows, work.qkv, Then::kStore);
    attend(t, frame, work);
    apply(block.proj, work.y, rows, work.x, Then::kAdd);
    norm_rows(work.x, block.norm2, work.y, rows, t.hidden, t.eps);
    apply(block.fc1, work.y, rows, work.act, Then::kGeluTanh);
    apply(block.fc2, work.act, rows, work.x, Then::kAdd);
    if (level < last && t.levels[level] == static_cast<int64_t>(b)) {
      merge(t, t.mergers[level + 1], work, rows, true, out + (level + 1) * plane);
      ++level;
    }
  }
  merge(t, t.mergers[0], work, rows, false, out);
}

// Reads the tensors of a tower one after another.
struct Reader {
  at::TensorList tensors;
  size_t next = 0;

  const float* vector() {
    TORCH_CHECK_VALUE(next < tensors.size() && tensors[next].is_contiguous(), "packed_vision: weight ", next,
                      " is missing or not contiguous");
    return tensors[next++].const_data_ptr<float>();
  }
  Norm norm() {
    const float* weight = vector();
    return {weight, vector()};
  }
  Linear linear() {
    const size_t at = next;
    const float *panels = vector(), *bias = vector();
    const int64_t inner = tensors[at].size(1), columns = tensors[at + 1].size(0);
    TORCH_CHECK_VALUE(columns == tensors[at].size(0) * kPanel, "packed_vision: bias ", at + 1, " has ", columns,
                      " entries for ", tensors[at].size(0), " panels");
    return {panels, bias, inner, columns};
  }
};

Tensor packed_vision(const Tensor& pixels_in, const Tensor& lengths_in, at::TensorList tables, at::TensorList weights,
                     at::IntArrayRef levels, int64_t blocks, int64_t heads, int64_t unit, int64_t width, double eps) {
  const Tensor pixels = pixels_in.contiguous(), lengths = lengths_in.contiguous();
  Reader read{weights};
  Tower t;
  t.patch = read.linear();
  for (int64_t b = 0; b < blocks; ++b) {
    Block block;
    block.norm1 = read.norm(), block.qkv = read.linear(), block.proj = read.linear();
    block.norm2 = read.norm(), block.fc1 = read.linear(), block.fc2 = read.linear();
    t.blocks.push_back(block);
  }
  for (size_t m = 0; m <= levels.size(); ++m) {
    Merger merger;
    merger.norm = read.norm(), merger.fc1 = read.linear(), merger.fc2 = read.linear();
    TORCH_CHECK_VALUE(width > merger.fc2.columns - kPanel && width <= merger.fc2.columns, "packed_vision: width ",
                      width, " for panels of ", merger.fc2.columns, " columns");
    merger.fc2.columns = width;
    t.mergers.push_back(merger);
  }
  t.levels = levels.vec(), t.heads = heads, t.unit = unit, t.eps = static_cast<float>(eps);
  t.hidden = t.patch.columns;
  TORCH_CHECK_VALUE(pixels.size(1) == t.patch.inner, "packed_vision: patches of ", pixels.size(1), " values for ",
                    t.patch.inner);
  const int64_t* length = lengths.const_data_ptr<int64_t>();
  std::vector<Frame> frames;
  int64_t row = 0, most = 0;
  for (int64_t f = 0; f < lengths.numel(); ++f) {
    const Tensor *positions = &tables[3 * f], *cos = positions + 1, *sin = cos + 1;
    TORCH_CHECK_VALUE(length[f] % unit == 0 && positions->size(0) == length[f] && positions->size(1) == t.hidden &&
                          cos->size(0) == length[f] && cos->size(1) == t.dim() / 2 && sin->sizes() == cos->sizes() &&
                          positions->is_contiguous() && cos->is_contiguous() && sin->is_contiguous(),
                      "packed_vision: the tables of frame ", f, " do not fit its ", length[f], " patches");
    frames.push_back({pixels.const_data_ptr<float>() + row * pixels.size(1), positions->const_data_ptr<float>(),
                      cos->const_data_ptr<float>(), sin->const_data_ptr<float>(), length[f], row / unit});
    row += length[f];
    most = std::max(most, length[f]);
  }
  TORCH_CHECK_VALUE(row == pixels.size(0), "packed_vision: ", pixels.size(0), " patches for frames of ", row);
  Tensor out = at::empty({static_cast<int64_t>(t.mergers.size()), row / unit, t.mergers[0].fc2.columns},
                         pixels.options());
  float* to = out.mutable_data_ptr<float>();
  const int64_t plane = out.stride(0);
  parallel_items(static_cast<int64_t>(frames.size()), Work::size(t, most),
                 [&](int64_t f, float* scratch) { encode(t, frames[f], scratch, to, plane); });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def(
      "packed_vision(Tensor pixels, Tensor lengths, Tensor[] tables, Tensor[] weights, int[] levels, int blocks, "
      "int heads, int unit, int width, float eps) -> Tensor");
  m.impl("packed_vision", c10::DispatchKey::CPU, TORCH_FN(packed_vision));
}

// Matrix product with a weight as it is stored, [N, K], in fp32 or bf16, all arithmetic in fp32. See kernels/linear.
//
// A task is a few neighbouring tiles of 2 kLanes weight rows. Of a tile, kDepth columns at a time are transposed (and
// widened) into a panel that stays in the L1 cache, and every block of rows of x is multiplied with it. So a weight is
// read from memory once for each kBlockRows rows. bf16 is widened because a processor's fp32 multiply-adds are at
// least as fast as its bf16 ones where there are no matrix units (on Emerald Rapids vdpbf16ps has half their rate).
//
// A result is one chain of multiply-adds in the order of k, so its bits depend on its row of x and of the weight alone:
// not on the other rows, nor on the threads, nor on the width of the vectors.
#include "linear.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <type_traits>

#include "linear_matrix.h"
#include "linear_tile.h"

namespace {

// out[r][c] = row `row + r` of x times row `first + c` of the weight, up to `end`.
template <int kLanes, class T, class Out>
AXPO_INLINE void tiles(const Problem<T>& p, int64_t row, int64_t rows, int64_t first, int64_t end, Out* out,
                       float* scratch) {
  constexpr int64_t kColumns = 2 * kLanes, kUnit = 64 / sizeof(T);
  float* panel = scratch;
  float* sums = panel + kDepth * kColumns;
  const int64_t blocks = parts(rows, kRegisterRows<kLanes>);
  for (int64_t n = first; n < end; n += kColumns) {
    const int64_t columns = std::min(kColumns, end - n);
    if (p.k == 0) std::fill_n(sums, rows * kColumns, 0.0f);
    for (int64_t k = 0; k < p.k; k += kDepth) {
      const int64_t depth = std::min(kDepth, p.k - k), strip_count = parts(depth, kUnit) * kUnit / kStrip;
      pack_weights<kLanes>(p.weight + n * p.stride + k, p.stride, columns, depth, panel);
      // What is packed next: the columns behind these, or the beginning of the tile behind this one.
      const bool same = k + kDepth < p.k;
      const int64_t next_n = same ? n : n + kColumns, next_k = same ? k + kDepth : 0;
      const int64_t next_rows = next_n < end ? std::min(kColumns, end - next_n) : 0;
      const int64_t next_lines = parts(std::min(kDepth, p.k - next_k), kUnit);
      Ahead ahead{reinterpret_cast<const char*>(p.weight + next_n * p.stride + next_k),
                  p.stride * static_cast<int64_t>(sizeof(T)), next_rows, next_rows ? next_lines : 0};
      const int64_t lines = parts(next_rows * next_lines, std::min<int64_t>(blocks, 4) * strip_count);
      for (int64_t b = 0; b < blocks; ++b) {  // blocks of nearly equal size
        const int64_t from = b * rows / blocks, count = (b + 1) * rows / blocks - from;
        const float* x = p.x + (k / kStrip * p.m + row + from) * kStrip;
        multiply_rows<kLanes>(count, x, p.m, panel, strip_count, k == 0, sums + from * kColumns, ahead, lines);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* from = sums + r * kColumns;
      Out* to = out + r * p.out_stride + n - first;
      if (p.bias != nullptr) {
        for (int64_t i = 0; i < columns; ++i) from[i] += load_one(p.bias + n + i);
      }
      int64_t i = 0;
      for (; i + 8 <= columns; i += 8) store_row8(to + i, load8(from + i));
      for (; i < columns; ++i) store_one(to + i, from[i]);
    }
  }
}

// One clone of each combination: templates cannot be cloned.
#define AXPO_TILES(T, Out)                                                                                         \
  AXPO_WIDE void tiles_wide(const Problem<T>& p, int64_t row, int64_t rows, int64_t first, int64_t end, Out* out,  \
                            float* scratch) {                                                                      \
    tiles<16>(p, row, rows, first, end, out, scratch);                                                             \
  }                                                                                                                \
  AXPO_CLONES void tiles_narrow(const Problem<T>& p, int64_t row, int64_t rows, int64_t first, int64_t end,        \
                                Out* out, float* scratch) {                                                        \
    tiles<8>(p, row, rows, first, end, out, scratch);                                                              \
  }
AXPO_TILES(float, float)
AXPO_TILES(bf16, bf16)
AXPO_TILES(bf16, float)
#undef AXPO_TILES
#define AXPO_MATRIX_TILES(target, name, Unit, Out)                                                                 \
  target void name(const Problem<bf16>& p, int64_t row, int64_t rows, int64_t first, int64_t end, Out* out,        \
                   float* scratch) {                                                                               \
    matrix_tiles<Unit>(p, row, rows, first, end, out, scratch);                                                    \
  }
AXPO_MATRIX_TILES(AXPO_CLONES, tiles_emulated, EmulatedUnit, bf16)
AXPO_MATRIX_TILES(AXPO_CLONES, tiles_emulated, EmulatedUnit, float)
#ifdef AXPO_AMX
AXPO_MATRIX_TILES(AXPO_WIDE, tiles_amx, AmxUnit, bf16)
AXPO_MATRIX_TILES(AXPO_WIDE, tiles_amx, AmxUnit, float)
#endif
#undef AXPO_MATRIX_TILES

const bool kWide = has_wide_vectors();
const int kWidth = kWide ? 32 : 16;  // columns of a tile

template <class T, class Out>
void part(const Problem<T>& p, int64_t row, int64_t rows, int64_t first, int64_t end, Out* out, float* scratch) {
  if constexpr (std::is_same_v<T, bf16>) {
#ifdef AXPO_AMX
    if (matrix_unit() == MatrixUnit::kAmx) return tiles_amx(p, row, rows, first, end, out, scratch);
#endif
    if (matrix_unit() == MatrixUnit::kEmulated) return tiles_emulated(p, row, rows, first, end, out, scratch);
  }
  if (kWide) {
    tiles_wide(p, row, rows, first, end, out, scratch);
  } else {
    tiles_narrow(p, row, rows, first, end, out, scratch);
  }
}

AXPO_CLONES void to_strips(const float* x, int64_t k, int64_t stride, float* out) {
  for (int64_t i = 0; i < k; i += kStrip) {
    for (int64_t j = 0; j < kStrip; ++j) out[i / kStrip * stride + j] = i + j < k ? x[i + j] : 0.0f;
  }
}
AXPO_CLONES void to_strips(const bf16* x, int64_t k, int64_t stride, float* out) {
  int64_t i = 0;
  for (; i + kStrip <= k; i += kStrip) {
    for (int64_t j = 0; j < kStrip; j += 8) store8(out + i / kStrip * stride + j, Lanes<8>::load(x + i + j));
  }
  for (int64_t j = 0; i < k && j < kStrip; ++j) out[i / kStrip * stride + j] = i + j < k ? load_one(x + i + j) : 0.0f;
}

// x in the order that `part` reads it in.
template <class T>
Buffer strips_of(const at::Tensor& x, int64_t rows) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (matrix_unit() != MatrixUnit::kNone) return pairs_of(x.const_data_ptr<bf16>(), rows, x.size(-1));
  }
  constexpr int64_t kUnit = 64 / sizeof(T);
  const int64_t k = x.size(-1), strip_count = parts(k, kUnit) * kUnit / kStrip;
  Buffer out = buffer(strip_count * rows * kStrip);
  const T* from = x.const_data_ptr<T>();
  at::parallel_for(0, rows, std::max<int64_t>(1, (1 << 16) / (k + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      to_strips(from + r * k, k, rows * kStrip, out.get() + r * kStrip);
      for (int64_t s = parts(k, kStrip); s < strip_count; ++s) {
        std::fill_n(out.get() + (s * rows + r) * kStrip, kStrip, 0.0f);
      }
    }
  });
  return out;
}

template <class T>
Problem<T> problem(const float* strips, int64_t rows, const at::Tensor& weight, const at::Tensor& bias,
                   int64_t out_stride) {
  return {strips,         weight.const_data_ptr<T>(), bias.defined() ? bias.const_data_ptr<T>() : nullptr, rows,
          weight.size(0), weight.size(1),             weight.stride(0),                                    out_stride};
}

template <class T, class Out>
void product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::Tensor& out) {
  const int64_t n = weight.size(0), m = out.numel() / n;
  const Buffer strips = strips_of<T>(x, m);
  const Problem<T> p = problem<T>(strips.get(), m, weight, bias, n);
  Out* to = out.mutable_data_ptr<Out>();
  // About eight tasks a thread keep the threads balanced.
  const int64_t row_blocks = parts(m, kBlockRows), tile_count = parts(n, kWidth);
  const int64_t run = std::max<int64_t>(1, row_blocks * tile_count / (8 * at::get_num_threads()));
  const int64_t runs = parts(tile_count, std::min(run, tile_count)), width = parts(tile_count, runs) * kWidth;
  parallel_items(row_blocks * runs, axpo::product_scratch(), [&](int64_t item, float* scratch) {
    const int64_t row = item / runs * kBlockRows, first = item % runs * width;
    const int64_t rows = std::min<int64_t>(kBlockRows, m - row), end = std::min(n, first + width);
    if (first < end) part(p, row, rows, first, end, to + row * n + first, scratch);
  });
}

at::Tensor linear_op(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, bool wide) {
  return axpo::linear(x, weight, bias, wide);
}

}  // namespace

at::Tensor axpo::linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        bool wide) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 2 && x.size(-1) == weight.size(1), "linear: x ", x.sizes(),
                    " and weight ", weight.sizes(), " must be [..., K] and [N, K]");
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "linear: bias ",
                    bias ? bias->sizes() : at::IntArrayRef(), " needs one entry for each of the ", weight.size(0),
                    " rows of weight");
  const auto dtype = weight.scalar_type();
  TORCH_CHECK_VALUE((dtype == at::kFloat || dtype == at::kBFloat16) && x.scalar_type() == dtype &&
                        (!bias || bias->scalar_type() == dtype),
                    "linear: x ", x.scalar_type(), ", weight ", dtype, " and bias must all be fp32 or all be bf16");
  at::DimVector sizes(x.sizes());
  sizes.back() = weight.size(0);
  at::Tensor out = at::empty(sizes, x.options().dtype(wide ? at::kFloat : dtype));
  if (out.numel() == 0) return out;
  const at::Tensor x_c = x.contiguous(), weight_c = weight.stride(1) == 1 ? weight : weight.contiguous();
  const at::Tensor bias_c = bias ? bias->contiguous() : at::Tensor();
  if (dtype == at::kFloat) {
    product<float, float>(x_c, weight_c, bias_c, out);
  } else if (wide) {
    product<bf16, float>(x_c, weight_c, bias_c, out);
  } else {
    product<bf16, bf16>(x_c, weight_c, bias_c, out);
  }
  return out;
}

int64_t axpo::product_scratch() { return (kDepth + kBlockRows) * kWidth; }

axpo::Strips::Strips(const at::Tensor& x)
    : rows(x.size(0)), memory(x.scalar_type() == at::kBFloat16 ? strips_of<bf16>(x, rows) : strips_of<float>(x, rows)) {}

void axpo::Strips::times(const at::Tensor& weight, int64_t row, int64_t count, int64_t first, int64_t end, float* out,
                         int64_t out_stride, float* scratch) const {
  if (weight.scalar_type() == at::kBFloat16) {
    part(problem<bf16>(memory.get(), rows, weight, {}, out_stride), row, count, first, end, out, scratch);
  } else {
    part(problem<float>(memory.get(), rows, weight, {}, out_stride), row, count, first, end, out, scratch);
  }
}

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None, bool wide=False) -> Tensor");
  m.impl("linear", c10::DispatchKey::CPU, TORCH_FN(linear_op));
}

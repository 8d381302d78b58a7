// Matrix product with a weight as it is stored, [N, K], in fp32 or bf16, all arithmetic in fp32. See kernels/linear.
//
// A task is a few neighbouring tiles of 2 kLanes weight rows. Of a tile, kDepth columns at a time are transposed (and
// widened) into a panel that stays in the L1 cache, and every block of rows of x is multiplied with it. So a weight is
// read from memory once for each kBlockRows rows. bf16 is widened because a processor's fp32 multiply-adds are at
// least as fast as its bf16 ones where there are no matrix units (half as fast on Sapphire and Emerald Rapids).
//
// A result is one chain of multiply-adds in the order of k, so its bits depend on its row of x and of the weight alone:
// not on the other rows, nor on the threads, nor on the width of the vectors.
#include "linear.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <type_traits>

#include "linear_tile.h"

namespace {

template <class T, class Out>
struct Problem {
  const float* x;  // strips [x_strips][m][16], zeros behind the K columns
  const T* weight;
  const T* bias;  // or nullptr
  Out* out;       // [m, n]
  int64_t m, n, k, stride;  // stride: elements from one row of the weight to the next
};

int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }

int64_t linear_scratch(int lanes) { return (kDepth + kBlockRows) * 2 * lanes; }

// Rows `row` .. `row + rows` of x times the tiles of the weight that begin at its rows first, first + 2 kLanes, … below
// `end`.
template <int kLanes, class T, class Out>
AXPO_INLINE void tiles(const Problem<T, Out>& p, int64_t row, int64_t rows, int64_t first, int64_t end,
                       float* scratch) {
  constexpr int64_t kColumns = 2 * kLanes, kUnit = 64 / sizeof(T);
  float* panel = scratch;
  float* sums = panel + kDepth * kColumns;
  const int64_t blocks = parts(rows, kProductRows<kLanes>);
  for (int64_t n = first; n < end; n += kColumns) {
    const int64_t columns = std::min(kColumns, p.n - n);
    if (p.k == 0) std::fill_n(sums, rows * kColumns, 0.0f);
    for (int64_t k = 0; k < p.k; k += kDepth) {
      const int64_t depth = std::min(kDepth, p.k - k), strip_count = parts(depth, kUnit) * kUnit / kStrip;
      pack_weights<kLanes>(p.weight + n * p.stride + k, p.stride, columns, depth, panel);
      // What is packed next: the columns behind these, or the beginning of the tile behind this one.
      const bool same = k + kDepth < p.k;
      const int64_t next_n = same ? n : n + kColumns, next_k = same ? k + kDepth : 0;
      const int64_t next_rows = next_n < end ? std::min(kColumns, p.n - next_n) : 0;
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
      Out* to = p.out + (row + r) * p.n + n;
      if (p.bias != nullptr) {
        for (int64_t i = 0; i < columns; ++i) from[i] += load_one(p.bias + n + i);
      }
      int64_t i = 0;
      for (; i + 8 <= columns; i += 8) store_row8(to + i, load8(from + i));
      for (; i < columns; ++i) store_one(to + i, from[i]);
    }
  }
}

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && __GNUC__ >= 12
#define AXPO_WIDE __attribute__((target("arch=x86-64-v4")))
bool has_wide() { return __builtin_cpu_supports("x86-64-v4"); }
#else
#define AXPO_WIDE
bool has_wide() { return false; }
#endif
// One clone of each combination: templates cannot be cloned.
#define AXPO_TILES(T, Out)                                                                                            \
  AXPO_WIDE void tiles_wide(const Problem<T, Out>& p, int64_t row, int64_t rows, int64_t first, int64_t end,          \
                            float* scratch) {                                                                         \
    tiles<16>(p, row, rows, first, end, scratch);                                                                     \
  }                                                                                                                   \
  AXPO_CLONES void tiles_narrow(const Problem<T, Out>& p, int64_t row, int64_t rows, int64_t first, int64_t end,      \
                                float* scratch) {                                                                     \
    tiles<8>(p, row, rows, first, end, scratch);                                                                      \
  }
AXPO_TILES(float, float)
AXPO_TILES(bf16, bf16)
AXPO_TILES(bf16, float)
#undef AXPO_TILES

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

template <class T, class Out>
void product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::Tensor& out) {
  constexpr int64_t kUnit = 64 / sizeof(T);
  const int64_t k = weight.size(1), n = weight.size(0), m = out.numel() / n;
  const int64_t x_strips = parts(k, kUnit) * kUnit / kStrip;
  const Buffer strips = buffer(x_strips * m * kStrip);
  const T* from = x.const_data_ptr<T>();
  at::parallel_for(0, m, std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(k, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      to_strips(from + r * k, k, m * kStrip, strips.get() + r * kStrip);
      for (int64_t s = parts(k, kStrip); s < x_strips; ++s) {
        std::fill_n(strips.get() + (s * m + r) * kStrip, kStrip, 0.0f);
      }
    }
  });
  const Problem<T, Out> p{strips.get(), weight.const_data_ptr<T>(), bias.defined() ? bias.const_data_ptr<T>() : nullptr,
                          out.mutable_data_ptr<Out>(), m, n, k, weight.stride(0)};
  static const bool wide = has_wide();
  const int lanes = wide ? 16 : 8;
  // About eight tasks a thread keep the threads balanced.
  const int64_t row_blocks = parts(m, kBlockRows), tile_count = parts(n, 2 * lanes);
  const int64_t run = std::max<int64_t>(1, row_blocks * tile_count / (8 * at::get_num_threads()));
  const int64_t runs = parts(tile_count, std::min(run, tile_count)), width = parts(tile_count, runs) * 2 * lanes;
  parallel_items(row_blocks * runs, linear_scratch(lanes), [&](int64_t item, float* scratch) {
    const int64_t row = item / runs * kBlockRows, first = item % runs * width;
    const int64_t rows = std::min<int64_t>(kBlockRows, m - row), end = std::min(n, first + width);
    if (wide) {
      tiles_wide(p, row, rows, first, end, scratch);
    } else {
      tiles_narrow(p, row, rows, first, end, scratch);
    }
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

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None, bool wide=False) -> Tensor");
  m.impl("linear", c10::DispatchKey::CPU, TORCH_FN(linear_op));
}

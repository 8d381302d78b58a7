// The pieces of tree attention that work on one tile: shapes, packing, products, the mask. See tree_attention.cpp.
#pragma once

#include <vector>

#include "attention.h"

namespace {

using namespace axpo;

constexpr int kRows = 48;               // queries in a tile: a multiple of 16 and of kBlock
constexpr int kBlock = 6;               // rows that one product keeps in registers
constexpr int kPanel = 16;              // keys in a panel
constexpr int kGroup = 4;               // panels handled together
constexpr int kCols = kGroup * kPanel;  // columns of a score tile
constexpr int64_t kMaxDim = 256;
static_assert(kRows % kBlock == 0 && kRows % 16 == 0);

struct Shape {
  int64_t tokens, q_heads, kv_heads, dim, strips, panels, tiles;
  int64_t padded() const { return strips * kStrip; }        // D rounded up to whole strips
  int64_t panel_size() const { return padded() * kPanel; }  // floats of one packed panel
  int64_t group() const { return q_heads / kv_heads; }
};

// What a query needs to know about a panel of keys to skip it or to skip its mask.
struct Visibility {
  std::vector<int32_t> end;       // [panels * 16] subtree_end; 0 behind the last token, so such a key is never seen
  std::vector<int32_t> latest;    // [panels] largest subtree_end
  std::vector<int32_t> earliest;  // [panels] smallest subtree_end

  bool seen(int64_t panel, int64_t first) const { return latest[panel] > first; }
  bool full(int64_t panel, int64_t first, int64_t last) const {
    return panel * kPanel + kPanel - 1 <= first && earliest[panel] > last;
  }
};

// ---- packing ----

// `count` rows of x, times factor, as strips [strips][out_rows][16]; the rest zeros.
AXPO_CLONES void pack_rows(const float* x, int64_t row_stride, int64_t count, int64_t out_rows, int64_t dim,
                           float factor, float* out) {
  for (int64_t s = 0; s < strips(dim); ++s) {
    const int64_t halves = std::min<int64_t>(2, dim / 8 - 2 * s);
    for (int64_t r = 0; r < out_rows; ++r) {
      for (int64_t half = 0; half < 2; ++half) {
        const bool inside = r < count && half < halves;
        const f32x8 value = inside ? load8(x + r * row_stride + s * kStrip + 8 * half) * splat8(factor) : splat8(0.0f);
        store8(out + (s * out_rows + r) * kStrip + 8 * half, value);
      }
    }
  }
}

// The same rows (at most 16) transposed: out [padded D][16].
AXPO_CLONES void pack_transposed(const float* x, int64_t row_stride, int64_t count, int64_t dim, float* out) {
  float tail[kPanel * kMaxDim];
  if (count < kPanel) {  // the last panel: filled up with zeros
    std::fill_n(tail, kPanel * dim, 0.0f);
    for (int64_t r = 0; r < count; ++r) std::copy_n(x + r * row_stride, dim, tail + r * dim);
    x = tail;
    row_stride = dim;
  }
  for (int half = 0; half < 2; ++half) {
    for (int64_t d = 0; d < dim; d += 4) {
      f32x8 columns[4];
      load_columns4(x + 8 * half * row_stride + d, row_stride, columns);
      for (int k = 0; k < 4; ++k) store8(out + (d + k) * kPanel + 8 * half, columns[k]);
    }
    for (int64_t d = dim; d < strips(dim) * kStrip; ++d) store8(out + d * kPanel + 8 * half, splat8(0.0f));
  }
}

// ---- products on a tile ----

// scores[kRows][kCols] at columns [column, column + 16) = rows (strips [strips][kRows][16]) times panel (transposed).
AXPO_INLINE void row_products(const float* rows, const float* panel, int64_t strip_count, int64_t row_count,
                              float* scores) {
  for (int64_t r = 0; r < row_count; r += kBlock) {
    f32x8 acc[kBlock][2] = {};
    for (int64_t s = 0; s < strip_count; ++s) {
      fma16<kBlock, kStrip, 1>(acc, rows + (s * kRows + r) * kStrip, panel + s * kStrip * kPanel);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; ++i) {
      store8(scores + (r + i) * kCols, acc[i][0]);
      store8(scores + (r + i) * kCols + 8, acc[i][1]);
    }
  }
}

// out (strips [strips][kRows][16]) = out * decay[row] + weights [kRows][kCols] times panels (as rows).
template <bool kDecay>
AXPO_INLINE void weighted_rows(const float* weights, const float* const* panels, int64_t panel_count,
                               int64_t strip_count, int64_t row_count, const float* decay, float* out) {
  for (int64_t s = 0; s < strip_count; ++s) {
    for (int64_t r = 0; r < row_count; r += kBlock) {
      float* target = out + (s * kRows + r) * kStrip;
      f32x8 acc[kBlock][2];
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; ++i) {
        const f32x8 factor = splat8(kDecay ? decay[r + i] : 1.0f);
        acc[i][0] = load8(target + i * kStrip) * factor;
        acc[i][1] = load8(target + i * kStrip + 8) * factor;
      }
      for (int64_t n = 0; n < panel_count; ++n) {
        fma16<kBlock, kCols, 1>(acc, weights + r * kCols + n * kPanel, panels[n] + s * kPanel * kStrip);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; ++i) {
        store8(target + i * kStrip, acc[i][0]);
        store8(target + i * kStrip + 8, acc[i][1]);
      }
    }
  }
}

// out (a panel as rows, [strips][16][16]) += the 16 columns of weights, transposed, times rows ([strips][kRows][16]).
template <int MR>
AXPO_INLINE void add_columns(const float* weights, const float* rows, float* target) {
  f32x8 acc[MR][2];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    acc[i][0] = load8(target + i * kStrip);
    acc[i][1] = load8(target + i * kStrip + 8);
  }
  for (int k = 0; k < kRows; k += 16) fma16<MR, 1, kCols>(acc, weights + k * kCols, rows + k * kStrip);
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    store8(target + i * kStrip, acc[i][0]);
    store8(target + i * kStrip + 8, acc[i][1]);
  }
}

AXPO_INLINE void add_columns_of_panel(const float* weights, const float* rows, int64_t strip_count, float* out) {
  for (int64_t s = 0; s < strip_count; ++s) {
    const float* source = rows + s * kRows * kStrip;
    float* target = out + s * kPanel * kStrip;
    add_columns<6>(weights, source, target);
    add_columns<6>(weights + 6, source, target + 6 * kStrip);
    add_columns<4>(weights + 12, source, target + 12 * kStrip);
  }
}

// Minus infinity where query first + r does not see the key.
AXPO_INLINE void mask_panel(const int32_t* end, int64_t key, int64_t first, int64_t row_count, float* scores) {
  const i32x8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  const i32x8 keys[2] = {lane + static_cast<int32_t>(key), lane + static_cast<int32_t>(key + 8)};
  i32x8 ends[2];
  std::memcpy(ends, end, sizeof(ends));
  for (int64_t r = 0; r < row_count; ++r) {
    const int32_t query = static_cast<int32_t>(first + r);
    for (int half = 0; half < 2; ++half) {
      float* at = scores + r * kCols + 8 * half;
      const i32x8 seen = (keys[half] <= query) & (query < ends[half]);
      store8(at, seen ? load8(at) : splat8(kNegInf));
    }
  }
}

}  // namespace

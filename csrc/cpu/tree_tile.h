// The pieces of tree attention that work on one tile: shapes, packing, products, the mask. See tree_attention.cpp.
#pragma once

#include <vector>

#include "tree_vector.h"

namespace {

using namespace axpo;

constexpr int kRows = 48;               // queries in a tile: a multiple of 16 and of every kBlock
constexpr int kPanel = 16;              // keys in a panel
constexpr int kGroup = 8;               // panels handled together
constexpr int kCols = kGroup * kPanel;  // columns of a score tile
constexpr int64_t kMaxDim = 256;
static_assert(kRows % Narrow::kBlock == 0 && kRows % Wide::kBlock == 0 && kRows % 16 == 0 && kGroup % 2 == 0);

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

// ---- rows in memory <-> strips ----

// `count` rows of x, times factor, as strips [strips][out_rows][16]; the rest zeros.
template <class T>
AXPO_INLINE void pack_rows_of(const T* x, int64_t row_stride, int64_t count, int64_t out_rows, int64_t dim,
                              float factor, float* out) {
  for (int64_t s = 0; s < strips(dim); ++s) {
    const int64_t halves = std::min<int64_t>(2, dim / 8 - 2 * s);
    for (int64_t r = 0; r < out_rows; ++r) {
      for (int64_t half = 0; half < 2; ++half) {
        const bool inside = r < count && half < halves;
        const T* from = x + r * row_stride + s * kStrip + 8 * half;
        store8(out + (s * out_rows + r) * kStrip + 8 * half,
               inside ? load_row8(from) * splat8(factor) : splat8(0.0f));
      }
    }
  }
}

// rows [row] = strips [strips][kRows][16] * factor[row].
template <class T>
AXPO_INLINE void unpack_rows_of(const float* from, const float* factor, int64_t count, int64_t dim, int64_t row_stride,
                                T* rows) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t d = 0; d < dim; d += 8) {
      const f32x8 value = load8(from + (d / kStrip * kRows + r) * kStrip + d % kStrip);
      store_row8(rows + r * row_stride + d, value * splat8(factor[r]));
    }
  }
}

// out[r] = the dot product of the rows, for kRows rows; 0 from `count` on.
template <class T>
AXPO_INLINE void row_dots_of(const T* a, const T* b, int64_t row_stride, int64_t count, int64_t dim, float* out) {
  for (int64_t r = 0; r < kRows; ++r) {
    f32x8 total = splat8(0.0f);
    for (int64_t d = 0; r < count && d < dim; d += 8) {
      total += load_row8(a + r * row_stride + d) * load_row8(b + r * row_stride + d);
    }
    out[r] = sum8(total);
  }
}

#define AXPO_ELEMENTS(T)                                                                                            \
  AXPO_CLONES void pack_rows(const T* x, int64_t row_stride, int64_t count, int64_t out_rows, int64_t dim,          \
                             float factor, float* out) {                                                            \
    pack_rows_of(x, row_stride, count, out_rows, dim, factor, out);                                                 \
  }                                                                                                                 \
  AXPO_CLONES void unpack_rows(const float* from, const float* factor, int64_t count, int64_t dim,                  \
                               int64_t row_stride, T* rows) {                                                       \
    unpack_rows_of(from, factor, count, dim, row_stride, rows);                                                     \
  }                                                                                                                 \
  AXPO_CLONES void row_dots(const T* a, const T* b, int64_t row_stride, int64_t count, int64_t dim, float* out) {   \
    row_dots_of(a, b, row_stride, count, dim, out);                                                                 \
  }
AXPO_ELEMENTS(float)
AXPO_ELEMENTS(bf16)
#undef AXPO_ELEMENTS

// 16 rows [strips][16][16] transposed: out [padded D][16].
AXPO_CLONES void transpose_panel(const float* rows, int64_t strip_count, float* out) {
  for (int64_t s = 0; s < strip_count; ++s) {
    for (int half = 0; half < 2; ++half) {
      for (int64_t d = 0; d < kStrip; d += 4) {
        f32x8 columns[4];
        load_columns4(rows + (s * kPanel + 8 * half) * kStrip + d, kStrip, columns);
        for (int k = 0; k < 4; ++k) store8(out + (s * kStrip + d + k) * kPanel + 8 * half, columns[k]);
      }
    }
  }
}

// ---- products on a tile ----

// scores [kRows][kCols], from column 16 i on, = rows (strips [strips][kRows][16]) times panel i (transposed), for all
// `count` panels. An odd last panel may be followed by 16 columns of anything.
template <class Isa>
AXPO_INLINE void row_products(const float* rows, const float* const* panels, int64_t count, int64_t strip_count,
                              int64_t row_count, float* scores) {
  using V = typename Isa::V;
  for (int64_t i = 0; i < count; i += Isa::kPair) {
    const float *p0 = panels[i], *p1 = Isa::kPair == 1 ? p0 + 8 : panels[std::min(i + 1, count - 1)];
    for (int64_t r = 0; r < row_count; r += Isa::kBlock) {
      V acc[Isa::kBlock][2] = {};
      for (int64_t s = 0; s < strip_count; ++s) {
        const int64_t at = s * kStrip * kPanel;
        fma16_pair<Isa, Isa::kBlock, kStrip, 1>(acc, rows + (s * kRows + r) * kStrip, p0 + at, p1 + at);
      }
#pragma GCC unroll 16
      for (int j = 0; j < Isa::kBlock; ++j) {
        Isa::store(scores + (r + j) * kCols + i * kPanel, acc[j][0]);
        Isa::store(scores + (r + j) * kCols + i * kPanel + Isa::kLanes, acc[j][1]);
      }
    }
  }
}

// Where the second vector of a register tile lies, behind the first: half a strip on, or a whole one. The last of an
// odd number of strips is computed twice.
template <class Isa>
AXPO_INLINE int64_t second(int64_t s, int64_t strip_count, int64_t strip_size) {
  return Isa::kPair == 1 ? 8 : s + 1 < strip_count ? strip_size : 0;
}

// out (strips [strips][kRows][16]) = out * decay[row] + weights [kRows][kCols] times panels (as rows).
template <class Isa, bool kDecay>
AXPO_INLINE void weighted_rows(const float* weights, const float* const* panels, int64_t panel_count,
                               int64_t strip_count, int64_t row_count, const float* decay, float* out) {
  using V = typename Isa::V;
  for (int64_t s = 0; s < strip_count; s += Isa::kPair) {
    const int64_t next = second<Isa>(s, strip_count, kRows * kStrip);
    const int64_t next_of_panel = second<Isa>(s, strip_count, kPanel * kStrip);
    for (int64_t r = 0; r < row_count; r += Isa::kBlock) {
      float* target = out + (s * kRows + r) * kStrip;
      V acc[Isa::kBlock][2];
#pragma GCC unroll 16
      for (int i = 0; i < Isa::kBlock; ++i) {
        const float factor = kDecay ? decay[r + i] : 1.0f;
        acc[i][0] = Isa::load(target + i * kStrip) * factor;
        acc[i][1] = Isa::load(target + i * kStrip + next) * factor;
      }
      for (int64_t n = 0; n < panel_count; ++n) {
        const float* b = panels[n] + s * kPanel * kStrip;
        fma16_pair<Isa, Isa::kBlock, kCols, 1>(acc, weights + r * kCols + n * kPanel, b, b + next_of_panel);
      }
#pragma GCC unroll 16
      for (int i = 0; i < Isa::kBlock; ++i) {
        Isa::store(target + i * kStrip, acc[i][0]);
        Isa::store(target + i * kStrip + next, acc[i][1]);
      }
    }
  }
}

// Keys [first, first + MR) of out (a panel as rows, [strips][16][16]) += their columns of weights, transposed, times
// rows ([strips][kRows][16]).
template <class Isa, int MR>
AXPO_INLINE void add_columns(const float* weights, const float* rows, int64_t strip_count, float* out) {
  using V = typename Isa::V;
  for (int64_t s = 0; s < strip_count; s += Isa::kPair) {
    const int64_t next = second<Isa>(s, strip_count, kPanel * kStrip);
    const float* source = rows + s * kRows * kStrip;
    const float* source_next = source + second<Isa>(s, strip_count, kRows * kStrip);
    float* target = out + s * kPanel * kStrip;
    V acc[MR][2];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      acc[i][0] = Isa::load(target + i * kStrip);
      acc[i][1] = Isa::load(target + i * kStrip + next);
    }
    for (int k = 0; k < kRows; k += 16) {
      fma16_pair<Isa, MR, 1, kCols>(acc, weights + k * kCols, source + k * kStrip, source_next + k * kStrip);
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      Isa::store(target + i * kStrip, acc[i][0]);
      Isa::store(target + i * kStrip + next, acc[i][1]);
    }
  }
}

template <class Isa>
AXPO_INLINE void add_columns_of_panel(const float* weights, const float* rows, int64_t strip_count, float* out) {
  if constexpr (Isa::kLanes == 16) {
    add_columns<Isa, 8>(weights, rows, strip_count, out);
    add_columns<Isa, 8>(weights + 8, rows, strip_count, out + 8 * kStrip);
  } else {
    add_columns<Isa, 6>(weights, rows, strip_count, out);
    add_columns<Isa, 6>(weights + 6, rows, strip_count, out + 6 * kStrip);
    add_columns<Isa, 4>(weights + 12, rows, strip_count, out + 12 * kStrip);
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

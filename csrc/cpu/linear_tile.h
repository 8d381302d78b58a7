// The pieces of the matrix product that work on one tile: weights packed for the vector units, and the product.
#pragma once

#include "attention.h"
#include "lanes.h"

namespace {

using namespace axpo;

constexpr int64_t kDepth = 8 * kStrip;  // columns of the weight that are packed together
constexpr int kBlockRows = 256;         // rows of x that share a packed tile: their part of x stays in the L2 cache

template <class T>
struct Problem {
  const float* x;  // strips [..][m][16], zeros behind the K columns; for a matrix unit pairs, see linear_matrix.h
  const T* weight;
  const T* bias;  // or nullptr
  int64_t m, n, k, stride;  // stride: elements from one row of the weight to the next
  int64_t out_stride;
};

int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }

// Weights that the next steps will read, fetched a few lines at a time between the multiplications.
struct Ahead {
  const char* at;
  int64_t stride, rows, lines, row = 0, line = 0;

  AXPO_INLINE void run(int64_t count) {
    for (; count > 0 && line < lines; --count) {
      __builtin_prefetch(at + row * stride + 64 * line, 0, 2);
      if (++row == rows) row = 0, ++line;
    }
  }
};

// weight[0 .. rows)[0 .. columns) -> panel [2][columns, up to whole 64 bytes of the weight][kLanes], the halves
// kDepth * kLanes floats apart, zeros around it.
template <int kLanes, class T>
AXPO_INLINE void pack_weights(const T* weight, int64_t stride, int64_t rows, int64_t columns, float* panel) {
  constexpr int64_t kUnit = 64 / sizeof(T);
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t filled = std::clamp<int64_t>(rows - half * kLanes, 0, kLanes);
    for (int64_t k = 0; k < columns; k += kUnit) {
      const T* from = weight + half * kLanes * stride + k;
      int64_t step = stride;
      T edge[kLanes * kUnit];
      if (filled < kLanes || columns - k < kUnit) {
        const int64_t width = std::min(kUnit, columns - k);
        std::memset(static_cast<void*>(edge), 0, sizeof edge);
        for (int64_t r = 0; r < filled; ++r) std::memcpy(edge + r * kUnit, from + r * stride, width * sizeof(T));
        from = edge, step = kUnit;
      }
      float* to = panel + (half * kDepth + k) * kLanes;
#pragma GCC unroll 4
      for (int quad = 0; quad < 4; ++quad) {
        typename Lanes<kLanes>::V columns4[4];
        const char* row = reinterpret_cast<const char*>(from) + 16 * quad;
        transpose4<kLanes>(row, row + 8 * step * sizeof(T), step * sizeof(T), columns4);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          store_column<kLanes>(to, kLanes, 4 * quad + i, columns4[i], static_cast<const T*>(nullptr));
        }
      }
    }
  }
}

// sums[r][0 .. 2 kLanes) (+)= x[r] · panel for MR rows: of every result one chain of multiply-adds, in the order of k.
// x: strips [..][row_total][16], from the first of the rows on; panel: of pack_weights.
template <int MR, int kLanes>
AXPO_INLINE void multiply(const float* x, int64_t row_total, const float* panel, int64_t strip_count, bool first,
                          float* sums, Ahead& ahead, int64_t lines) {
  using L = Lanes<kLanes>;
  typename L::V acc[MR][2] = {};
  if (!first) {
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      acc[r][0] = L::load(sums + r * 2 * kLanes);
      acc[r][1] = L::load(sums + r * 2 * kLanes + kLanes);
    }
  }
  for (int64_t s = 0; s < strip_count; ++s, x += row_total * kStrip) {
    ahead.run(lines);
#pragma GCC unroll 4
    for (int k = 0; k < kStrip; ++k, panel += kLanes) {
      const typename L::V b0 = L::load(panel), b1 = L::load(panel + kDepth * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const float a = x[r * kStrip + k];
        acc[r][0] += b0 * a;
        acc[r][1] += b1 * a;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    L::store(sums + r * 2 * kLanes, acc[r][0]);
    L::store(sums + r * 2 * kLanes + kLanes, acc[r][1]);
  }
}

template <int kLanes>
AXPO_INLINE void multiply_rows(int64_t rows, const float* x, int64_t row_total, const float* panel,
                               int64_t strip_count, bool first, float* sums, Ahead& ahead, int64_t lines) {
  switch (rows) {
#define AXPO_ROWS(MR) \
  case MR:            \
    return multiply<MR, kLanes>(x, row_total, panel, strip_count, first, sums, ahead, lines);
    AXPO_ROWS(1) AXPO_ROWS(2) AXPO_ROWS(3) AXPO_ROWS(4) AXPO_ROWS(5)
    default: break;
  }
  if constexpr (kLanes == 16) {
    switch (rows) {
      AXPO_ROWS(7) AXPO_ROWS(8)
      default: break;
    }
  }
#undef AXPO_ROWS
  multiply<6, kLanes>(x, row_total, panel, strip_count, first, sums, ahead, lines);
}

}  // namespace

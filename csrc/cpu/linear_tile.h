// The pieces of the matrix product that work on one tile: weights packed for the vector units, and the product.
#pragma once

#include "attention.h"
#include "lanes.h"

namespace {

using namespace axpo;

constexpr int64_t kDepth = 8 * kStrip;  // columns of the weight that are packed together
constexpr int kBlockRows = 256;         // rows of x that share a packed tile: their part of x stays in the L2 cache

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

typedef float f32x4 __attribute__((vector_size(16)));
AXPO_INLINE f32x4 load4(const char* p) { return *reinterpret_cast<const f32x4_unaligned*>(p); }

// Four columns of kLanes rows, transposed: columns[i][row] = from[row][i] in units of 32 bits.
template <int kLanes>
AXPO_INLINE void transpose4(const char* from, int64_t stride, typename Lanes<kLanes>::V (&columns)[4]);

template <>
AXPO_INLINE void transpose4<8>(const char* from, int64_t stride, f32x8 (&columns)[4]) {
  f32x8 r[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = __builtin_shufflevector(load4(from + j * stride), load4(from + (j + 4) * stride), 0, 1, 2, 3, 4, 5, 6, 7);
  }
  const f32x8 a = __builtin_shufflevector(r[0], r[1], 0, 8, 1, 9, 4, 12, 5, 13);
  const f32x8 b = __builtin_shufflevector(r[0], r[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const f32x8 c = __builtin_shufflevector(r[2], r[3], 0, 8, 1, 9, 4, 12, 5, 13);
  const f32x8 d = __builtin_shufflevector(r[2], r[3], 2, 10, 3, 11, 6, 14, 7, 15);
  columns[0] = __builtin_shufflevector(a, c, 0, 1, 8, 9, 4, 5, 12, 13);
  columns[1] = __builtin_shufflevector(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
  columns[2] = __builtin_shufflevector(b, d, 0, 1, 8, 9, 4, 5, 12, 13);
  columns[3] = __builtin_shufflevector(b, d, 2, 3, 10, 11, 6, 7, 14, 15);
}

template <>
AXPO_INLINE void transpose4<16>(const char* from, int64_t stride, f32x16 (&columns)[4]) {
  f32x16 r[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // rows j, j + 4, j + 8, j + 12
    const f32x4 a = load4(from + j * stride), b = load4(from + (j + 4) * stride);
    const f32x4 c = load4(from + (j + 8) * stride), d = load4(from + (j + 12) * stride);
    const f32x8 low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
    const f32x8 high = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7);
    r[j] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
#define AXPO_SHUFFLE16(x, y, i, j, k, l)                                                                            \
  __builtin_shufflevector(x, y, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12, \
                          k + 12, l + 12)
  const f32x16 a = AXPO_SHUFFLE16(r[0], r[1], 0, 16, 1, 17), b = AXPO_SHUFFLE16(r[0], r[1], 2, 18, 3, 19);
  const f32x16 c = AXPO_SHUFFLE16(r[2], r[3], 0, 16, 1, 17), d = AXPO_SHUFFLE16(r[2], r[3], 2, 18, 3, 19);
  columns[0] = AXPO_SHUFFLE16(a, c, 0, 1, 16, 17), columns[1] = AXPO_SHUFFLE16(a, c, 2, 3, 18, 19);
  columns[2] = AXPO_SHUFFLE16(b, d, 0, 1, 16, 17), columns[3] = AXPO_SHUFFLE16(b, d, 2, 3, 18, 19);
#undef AXPO_SHUFFLE16
}

// Stores column i of 32-bit units: one fp32, or a pair of bf16 of which the first is the lower half.
template <int kLanes>
AXPO_INLINE void store_column(float* to, int i, typename Lanes<kLanes>::V v, const float*) {
  Lanes<kLanes>::store(to + i * 2 * kLanes, v);
}
template <int kLanes>
AXPO_INLINE void store_column(float* to, int i, typename Lanes<kLanes>::V v, const bf16*) {
  using V = typename Lanes<kLanes>::V;
  const auto pair = reinterpret_cast<typename Lanes<kLanes>::I>(v);
  Lanes<kLanes>::store(to + (2 * i) * 2 * kLanes, reinterpret_cast<V>(pair << 16));
  Lanes<kLanes>::store(to + (2 * i + 1) * 2 * kLanes, reinterpret_cast<V>(pair & static_cast<int32_t>(0xffff0000)));
}

// weight[0 .. rows)[0 .. columns) -> panel [columns, up to whole 64 bytes of the weight][2 kLanes], zeros around it.
template <int kLanes, class T>
AXPO_INLINE void pack_weights(const T* weight, int64_t stride, int64_t rows, int64_t columns, float* panel) {
  constexpr int64_t kUnit = 64 / sizeof(T);
  for (int64_t k = 0; k < columns; k += kUnit) {
    for (int64_t half = 0; half < 2; ++half) {
      const T* from = weight + half * kLanes * stride + k;
      int64_t step = stride;
      T edge[kLanes * kUnit];
      const int64_t filled = std::clamp<int64_t>(rows - half * kLanes, 0, kLanes);
      if (filled < kLanes || columns - k < kUnit) {
        const int64_t width = std::min(kUnit, columns - k);
        std::memset(static_cast<void*>(edge), 0, sizeof edge);
        for (int64_t r = 0; r < filled; ++r) std::memcpy(edge + r * kUnit, from + r * stride, width * sizeof(T));
        from = edge, step = kUnit;
      }
      float* to = panel + k * 2 * kLanes + half * kLanes;
#pragma GCC unroll 4
      for (int quad = 0; quad < 4; ++quad) {
        typename Lanes<kLanes>::V columns4[4];
        transpose4<kLanes>(reinterpret_cast<const char*>(from) + 16 * quad, step * sizeof(T), columns4);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          store_column<kLanes>(to, 4 * quad + i, columns4[i], static_cast<const T*>(nullptr));
        }
      }
    }
  }
}

// sums[r][0 .. 2 kLanes) (+)= x[r] · panel for MR rows: of every result one chain of multiply-adds, in the order of k.
// x: strips [..][row_total][16], from the first of the rows on; panel: [16 * strip_count][2 kLanes].
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
    for (int k = 0; k < kStrip; ++k, panel += 2 * kLanes) {
      const typename L::V b0 = L::load(panel), b1 = L::load(panel + kLanes);
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

// Rows that one product keeps in registers: there are 32 of 16 lanes, or 16 of 8.
template <int kLanes>
constexpr int kProductRows = kLanes == 16 ? 8 : 6;

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

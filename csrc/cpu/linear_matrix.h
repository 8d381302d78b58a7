// The matrix product of bf16 in tiles of a matrix unit. See matrix_unit.h and linear.cpp.
//
// It is computed as weight times x: so the weight is tiles as it lies in memory, and only x is put into pairs, once.
// An entry depends on its row of x and of the weight alone and is added up 32 at a time from k = 0, so its bits depend on
// no other row, nor on how the work is cut.
#pragma once

#include "linear_tile.h"
#include "matrix_unit.h"

namespace {

constexpr int64_t kTileFloats = kMatrixRows * kMatrixRows;
constexpr int64_t kAheadColumns = 8 * kMatrixDepth;  // how far ahead a weight's row is fetched

// x [rows, k] -> pairs [ceil(rows / 16)][16 ceil(k / 32)][16 rows][2], zeros around it.
Buffer pairs_of(const bf16* x, int64_t rows, int64_t k) {
  const int64_t pairs = parts(k, kMatrixDepth) * kMatrixRows;
  Buffer out = buffer(parts(rows, kMatrixRows) * pairs * kMatrixRows);
  at::parallel_for(0, parts(rows, kMatrixRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* to = out.get() + b * pairs * kMatrixRows;
      std::fill_n(to, pairs * kMatrixRows, 0.0f);
      for (int64_t r = 0; r < std::min(kMatrixRows, rows - b * kMatrixRows); ++r) {
        const bf16* from = x + (b * kMatrixRows + r) * k;
        int64_t i = 0;
        for (; i + 2 <= k; i += 2) std::memcpy(to + i / 2 * kMatrixRows + r, from + i, 2 * sizeof(bf16));
        if (i < k) std::memcpy(to + i / 2 * kMatrixRows + r, from + i, sizeof(bf16));
      }
    }
  });
  return out;
}

// Rows n .. n + 15, columns k .. k + 31 of the weight as a tile: where they lie, or, at an edge, copied between zeros.
struct WeightTile {
  const bf16* at;
  int64_t bytes;  // from one row to the next

  AXPO_INLINE WeightTile(const Problem<bf16>& p, int64_t n, int64_t rows, int64_t k, bf16* edge)
      : at(p.weight + n * p.stride + k), bytes(p.stride * static_cast<int64_t>(sizeof(bf16))) {
    const int64_t depth = std::min(kMatrixDepth, p.k - k);
    if (rows == kMatrixRows && depth == kMatrixDepth) return;
    std::memset(static_cast<void*>(edge), 0, kMatrixRows * kMatrixDepth * sizeof(bf16));
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(static_cast<void*>(edge + r * kMatrixDepth), at + r * p.stride, depth * sizeof(bf16));
    }
    at = edge, bytes = kMatrixDepth * static_cast<int64_t>(sizeof(bf16));
  }
};

// out[r][c] = row `row + r` of x times row `first + c` of the weight, up to `end`.
template <class Unit, class Out>
AXPO_INLINE void matrix_tiles(const Problem<bf16>& p, int64_t row, int64_t rows, int64_t first, int64_t end, Out* out,
                              float* scratch) {
  constexpr int64_t kPairBytes = kMatrixRows * sizeof(float);
  const int64_t block_floats = parts(p.k, kMatrixDepth) * kTileFloats;
  const int64_t first_block = row / kMatrixRows, end_block = parts(row + rows, kMatrixRows);
  bf16* edges = reinterpret_cast<bf16*>(scratch + 4 * kTileFloats);
  Unit unit;
  unit.configure(kMatrixRows);
  for (int64_t n = first; n < end; n += 2 * kMatrixRows) {
    const int64_t upper = std::min(kMatrixRows, end - n), lower = std::clamp<int64_t>(end - n - upper, 0, kMatrixRows);
    for (int64_t b = first_block; b < end_block; b += 2) {
      const bool both = b + 1 < end_block;
      unit.template zero<0>(), unit.template zero<1>(), unit.template zero<2>(), unit.template zero<3>();
      const float* x = p.x + b * block_floats;
      for (int64_t k = 0; k < p.k; k += kMatrixDepth, x += kTileFloats) {
        if (b == first_block && k + kAheadColumns < p.k) {
          for (int64_t r = 0; r < upper + lower; ++r) {
            __builtin_prefetch(p.weight + (n + r) * p.stride + k + kAheadColumns);
          }
        }
        const WeightTile a(p, n, upper, k, edges);
        unit.template load<4>(a.at, a.bytes);
        unit.template load<6>(x, kPairBytes);
        unit.template dot<0, 4, 6>();
        if (both) {
          unit.template load<7>(x + block_floats, kPairBytes);
          unit.template dot<1, 4, 7>();
        }
        if (lower == 0) continue;
        const WeightTile below(p, n + kMatrixRows, lower, k, edges + kMatrixRows * kMatrixDepth);
        unit.template load<5>(below.at, below.bytes);
        unit.template dot<2, 5, 6>();
        if (both) unit.template dot<3, 5, 7>();
      }
      unit.template store<0>(scratch, kPairBytes);
      unit.template store<1>(scratch + kTileFloats, kPairBytes);
      unit.template store<2>(scratch + 2 * kTileFloats, kPairBytes);
      unit.template store<3>(scratch + 3 * kTileFloats, kPairBytes);
      const int64_t begin = std::max(row, b * kMatrixRows), stop = std::min(row + rows, (b + 2) * kMatrixRows);
      for (int64_t r = begin; r < stop; ++r) {
        const float* sums = scratch + (r / kMatrixRows - b) * kTileFloats + r % kMatrixRows;
        Out* to = out + (r - row) * p.out_stride + n - first;
        for (int64_t i = 0; i < upper + lower; ++i) {
          float sum = sums[(i / kMatrixRows * 2 * kMatrixRows + i % kMatrixRows) * kMatrixRows];
          if (p.bias != nullptr) sum += load_one(p.bias + n + i);
          store_one(to + i, sum);
        }
      }
    }
  }
  unit.release();
}

}  // namespace

// The products of paged attention in tiles of a matrix unit. See matrix_unit.h and paged_attention.cpp.
#pragma once

#include "matrix_unit.h"
#include "paged_walk.h"

namespace {

using namespace axpo;

// What `attend` multiplies with where the cache is bf16 and D a multiple of 32.
//
// Scores are computed as keys times queries: so the keys are tiles as they lie in the cache, and only the queries are
// put into pairs, once. Products of bf16 are exact in fp32, so scores are as good as those of vectors; they are scaled in
// fp32. A weight is split into two bf16, its rounded value and the rounded rest, 16 bits together, so that outputs are as
// good, too. Values are put into pairs a run at a time.
//
// An entry of a tile depends on its row of A and its column of B alone, and keys are added up 32 at a time from absolute
// positions: a row's bits do not depend on the other rows. A tile of scores may reach over the end of its run's rows; what
// it writes there is overwritten by the runs that follow or never looked at. Tiles of outputs have the run's rows only.
template <int kVectorLanes, class Unit>
struct MatrixProducts {
  using Element = bf16;
  static constexpr int kLanes = kVectorLanes;
  static constexpr int64_t kScored = 3 * kMatrixRows;  // rows that share a tile of keys
  const Cache<bf16>& c;
  Prefetcher<bf16>& ahead;
  int64_t row_total;
  float *q, *panel;  // q: pairs, [D / 2][row_total]
  Unit unit;
  int64_t configured;  // rows of registers 0 to 5

  static int64_t padded(int64_t rows) { return (rows + kMatrixRows - 1) / kMatrixRows * kMatrixRows + kMatrixRows; }
  static int64_t query_floats(int64_t row_total, int64_t dim) { return row_total * dim / 2; }
  // Values in pairs, [16][D]; or sixteen keys from two places, and their scores, [3][16 keys][16 rows].
  static int64_t panel_floats(int64_t dim) { return kMatrixRows * std::max<int64_t>(dim, dim / 2 + kScored); }

  AXPO_INLINE void begin() {
    std::fill_n(q, query_floats(row_total, c.dim), 0.0f);
    configured = 0;
  }
  AXPO_INLINE void end() { unit.release(); }

  AXPO_INLINE void query(int64_t r, const bf16* from) {
    for (int64_t d = 0; d < c.dim; d += 2) std::memcpy(q + d / 2 * row_total + r, from + d, sizeof(float));
  }

  AXPO_INLINE void score(const Run& run, float* scores) {
    ahead.run(run.count / 2);
    configure(kMatrixRows);
    for (int64_t key = 0; key < run.count; key += kMatrixRows) {
      const int64_t first = run.at[key / 8], second = run.at[key / 8 + 1], octet = 8 * c.dim;
      const bf16* keys = c.k + first;
      if (second != first + octet) {
        bf16* joined = reinterpret_cast<bf16*>(panel + kScored * kMatrixRows);
        std::memcpy(static_cast<void*>(joined), keys, octet * sizeof(bf16));
        std::memcpy(static_cast<void*>(joined + octet), c.k + second, octet * sizeof(bf16));
        keys = joined;
      }
      for (int64_t r = 0; r < run.rows; r += kScored) {
        const float* rows = q + run.row + r;
        float* to = scores + r * kScores + key;
        const int64_t left = run.rows - r;
        left > 2 * kMatrixRows ? score_tiles<3>(rows, keys, to)
        : left > kMatrixRows   ? score_tiles<2>(rows, keys, to)
                               : score_tiles<1>(rows, keys, to);
      }
    }
  }

  // Each 32 weights become 32 rounded ones and 32 rests, in the same place.
  AXPO_INLINE void weights(float* row, int64_t width) {
    for (int64_t j = 0; j < width; j += kMatrixDepth) {
      float exact[kMatrixDepth];
      std::memcpy(exact, row + j, sizeof exact);
      bf16* to = reinterpret_cast<bf16*>(row + j);
      for (int64_t i = 0; i < kMatrixDepth; i += 8) {
        bf16 rounded[8];
        const f32x8 w = load8(exact + i);
        store_row8(rounded, w);
        std::memcpy(static_cast<void*>(to + i), rounded, sizeof rounded);
        store_row8(to + kMatrixDepth + i, w - load_row8(rounded));
      }
    }
  }

  AXPO_INLINE void value(const Run& run, const float* weights, float* out) {
    ahead.run(run.count - run.count / 2);
    pair_values(run);
    for (int64_t r = 0; r < run.rows; r += kMatrixRows) {
      configure(std::min<int64_t>(kMatrixRows, run.rows - r));
      const float* at = weights + r * kScores;
      unit.template load<4>(at, kScores * sizeof(float));
      unit.template load<5>(at + kMatrixRows, kScores * sizeof(float));
      int64_t d = 0;
      for (; d + 64 <= c.dim; d += 64) {
        value_tiles<0>(d, out + r * c.dim);
        value_tiles<2>(d + 32, out + r * c.dim);
      }
      if (d < c.dim) value_tiles<0>(d, out + r * c.dim);
    }
  }

 private:
  AXPO_INLINE void configure(int64_t rows) {
    if (configured != rows) unit.configure(configured = rows);
  }

  // scores[r][0 .. 16) = sixteen keys times rows r of the pairs at `rows`, for kTiles tiles of rows.
  template <int kTiles>
  AXPO_INLINE void score_tiles(const float* rows, const bf16* keys, float* scores) {
    const int64_t key_bytes = c.dim * sizeof(bf16), pair_bytes = row_total * sizeof(float);
    unit.template zero<0>();
    if constexpr (kTiles > 1) unit.template zero<1>();
    if constexpr (kTiles > 2) unit.template zero<2>();
    for (int64_t d = 0; d < c.dim; d += kMatrixDepth, rows += kMatrixDepth / 2 * row_total) {
      unit.template load<3>(keys + d, key_bytes);
      unit.template load<6>(rows, pair_bytes);
      unit.template dot<0, 3, 6>();
      if constexpr (kTiles > 1) {
        unit.template load<7>(rows + kMatrixRows, pair_bytes);
        unit.template dot<1, 3, 7>();
      }
      if constexpr (kTiles > 2) {
        unit.template load<5>(rows + 2 * kMatrixRows, pair_bytes);
        unit.template dot<2, 3, 5>();
      }
    }
    put_scores<0>(scores);
    if constexpr (kTiles > 1) put_scores<1>(scores + kMatrixRows * kScores);
    if constexpr (kTiles > 2) put_scores<2>(scores + 2 * kMatrixRows * kScores);
  }

  template <int T>
  AXPO_INLINE void put_scores(float* scores) {
    float* by_key = panel + T * kMatrixRows * kMatrixRows;  // [16 keys][16 rows]
    unit.template store<T>(by_key, kMatrixRows * sizeof(float));
    const float factor = c.scale * kLog2e;
    for (int64_t key = 0; key < kMatrixRows; key += kLanes) {
      for (int64_t r = 0; r < kMatrixRows; r += 4) {
        typename Lanes<kLanes>::V columns[4];
        const auto* from = reinterpret_cast<const char*>(by_key + key * kMatrixRows + r);
        transpose4<kLanes>(from, from + 8 * 64, 64, columns);
        for (int i = 0; i < 4; ++i) Lanes<kLanes>::store(scores + (r + i) * kScores + key, columns[i] * factor);
      }
    }
  }

  // panel[k][d] = the values of keys 2 k and 2 k + 1 of a run, zeros behind its keys.
  AXPO_INLINE void pair_values(const Run& run) {
    using L = Lanes<kLanes>;
    using I = typename L::I;
    for (int64_t key = 0; key < kGroup; key += 2) {
      const bf16* values = c.v + run.at[key / 8] + key % 8 * c.dim;
      float* to = panel + key / 2 * c.dim;
      for (int64_t d = 0; d < c.dim; d += kLanes) {
        I low = {}, high = {};  // a bf16 is read into the upper half of 32 bits
        if (key < run.count) low = reinterpret_cast<I>(L::load(values + d));
        if (key + 1 < run.count) high = reinterpret_cast<I>(L::load(values + c.dim + d));
        L::store(to + d, reinterpret_cast<typename L::V>((low >> 16 & 0xffff) | high));
      }
    }
  }

  // out[.. rows of the tiles ..][d .. d + 32) += the weights in registers 4 and 5 times the values.
  template <int C>
  AXPO_INLINE void value_tiles(int64_t d, float* out) {
    const int64_t row_bytes = c.dim * sizeof(float);
    unit.template load<C>(out + d, row_bytes);
    unit.template load<C + 1>(out + d + kMatrixRows, row_bytes);
    unit.template load<6>(panel + d, row_bytes);
    unit.template load<7>(panel + d + kMatrixRows, row_bytes);
    unit.template dot<C, 4, 6>();
    unit.template dot<C + 1, 4, 7>();
    unit.template dot<C, 5, 6>();
    unit.template dot<C + 1, 5, 7>();
    unit.template store<C>(out + d, row_bytes);
    unit.template store<C + 1>(out + d + kMatrixRows, row_bytes);
  }
};

}  // namespace

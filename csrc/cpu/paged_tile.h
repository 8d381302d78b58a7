// The products and the softmax of paged attention in vectors, all arithmetic in fp32. See paged_attention.cpp.
#pragma once

#include <type_traits>

#include "paged_walk.h"

namespace {

using namespace axpo;

constexpr int kFew = 6;        // up to so many rows, keys are transposed in registers instead of being packed

// An octet is eight keys, or eight values, at consecutive positions from a multiple of 8: `dim` elements apart in one
// block. It is given by where it begins in the cache.
//
// Octet<T>::load transposes kColumns columns of it in registers; column<i> is the i-th, of eight keys. Two
// neighbouring bf16 of a row move as one fp32.
template <class T>
struct Octet;

template <>
struct Octet<float> {
  static constexpr int kColumns = 4;
  f32x8 packed[4];
  AXPO_INLINE void load(const float* rows, int64_t stride) { load_columns4(rows, stride, packed); }
  AXPO_INLINE f32x8 column(int i) const { return packed[i]; }
};

template <>
struct Octet<c10::BFloat16> {
  static constexpr int kColumns = 8;
  f32x8 packed[4];
  AXPO_INLINE void load(const c10::BFloat16* rows, int64_t stride) {
    load_columns4(reinterpret_cast<const float*>(rows), stride / 2, packed);
  }
  AXPO_INLINE f32x8 column(int i) const {
    const i32x8 pair = reinterpret_cast<i32x8>(packed[i / 2]);
    return reinterpret_cast<f32x8>(i % 2 == 0 ? pair << 16 : pair & static_cast<int32_t>(0xffff0000));
  }
};

// scores[r][8 o ..] of MR rows against kOctets octets of keys. rows: [strips][..][16].
template <int MR, int kOctets, class T>
AXPO_INLINE void score_direct(const float* rows, int64_t row_total, const T* keys, const int64_t* at, int64_t dim,
                              float* scores) {
  f32x8 acc[MR][kOctets] = {};
  for (int64_t d = 0; d < dim; d += Octet<T>::kColumns) {
    const float* a = rows + d / kStrip * row_total * kStrip + d % kStrip;
    Octet<T> octets[kOctets];
#pragma GCC unroll 2
    for (int o = 0; o < kOctets; ++o) octets[o].load(keys + at[o] + d, dim);
#pragma GCC unroll 8
    for (int k = 0; k < Octet<T>::kColumns; ++k) {
#pragma GCC unroll 2
      for (int o = 0; o < kOctets; ++o) {
        const f32x8 column = octets[o].column(k);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) acc[r][o] += column * a[r * kStrip + k];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 2
    for (int o = 0; o < kOctets; ++o) store8(scores + r * kScores + 8 * o, acc[r][o]);
  }
}

template <int MR, class T>
AXPO_INLINE void score_few(const float* rows, int64_t row_total, const T* keys, const int64_t* at, int64_t octets,
                           int64_t dim, float* scores) {
  int64_t o = 0;
  if constexpr (MR <= 2) {  // two octets at once, for enough independent chains
    for (; o + 2 <= octets; o += 2) score_direct<MR, 2>(rows, row_total, keys, at + o, dim, scores + 8 * o);
  }
  for (; o < octets; ++o) score_direct<MR, 1>(rows, row_total, keys, at + o, dim, scores + 8 * o);
}

// 2 kLanes keys transposed into [strips * 16][2 kLanes], for products with many rows.
template <int kLanes, class T>
AXPO_INLINE void pack_keys(const T* keys, const int64_t* at, int64_t dim, float* out) {
  constexpr int64_t kPanel = 2 * kLanes, kOctets = kLanes / 8, kUnits = 4 * sizeof(float) / sizeof(T);
  for (int64_t half = 0; half < 2; ++half, at += kOctets) {
    float* to = out + half * kLanes;
    for (int64_t d = 0; d < dim; d += kUnits) {
      typename Lanes<kLanes>::V columns[4];
      const auto* low = reinterpret_cast<const char*>(keys + at[0] + d);
      const auto* high = reinterpret_cast<const char*>(keys + at[kOctets - 1] + d);
      transpose4<kLanes>(low, high, dim * static_cast<int64_t>(sizeof(T)), columns);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        store_column<kLanes>(to + d * kPanel, kPanel, i, columns[i], static_cast<const T*>(nullptr));
      }
    }
    for (int64_t d = dim; d < strips(dim) * kStrip; ++d) Lanes<kLanes>::store(to + d * kPanel, typename Lanes<kLanes>::V{});
  }
}

// The values of a run as floats, [count][dim], and where its octets begin there.
template <int kLanes>
AXPO_INLINE void widen_values(const bf16* values, const Run& run, int64_t dim, float* out, int64_t* at) {
  for (int64_t o = 0; 8 * o < run.count; ++o) {
    const bf16* octet = values + run.at[o];
    const int64_t count = std::min<int64_t>(8, run.count - 8 * o) * dim;
    at[o] = 8 * o * dim;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) Lanes<kLanes>::store(out + at[o] + i, Lanes<kLanes>::load(octet + i));
    for (; i < count; i += 8) store8(out + at[o] + i, Lanes<8>::load(octet + i));
  }
}

template <int MR, int kLanes>
AXPO_INLINE void score_packed(const float* rows, int64_t row_total, const float* keys, int64_t dim, float* scores) {
  using L = Lanes<kLanes>;
  typename L::V acc[MR][2] = {};
  for (int64_t s = 0; s < strips(dim); ++s, rows += row_total * kStrip) {
#pragma GCC unroll 4
    for (int k = 0; k < kStrip; ++k, keys += 2 * kLanes) {
      const typename L::V b0 = L::load(keys), b1 = L::load(keys + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const float x = rows[r * kStrip + k];
        acc[r][0] += b0 * x;
        acc[r][1] += b1 * x;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    L::store(scores + r * kScores, acc[r][0]);
    L::store(scores + r * kScores + kLanes, acc[r][1]);
  }
}

// out[r][d .. d + kLanes NV) += sum over the keys of weights[r][key] * values[key][d ..].
template <int MR, int NV, int kLanes, class T>
AXPO_INLINE void value_block(const float* weights, const T* values, const int64_t* at, int64_t count, int64_t d,
                             int64_t dim, float* out) {
  using L = Lanes<kLanes>;
  typename L::V acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < NV; ++c) acc[r][c] = L::load(out + r * dim + d + kLanes * c);
  }
  for (int64_t start = 0; start < count; start += 8) {
    const T* value = values + at[start / 8] + d;
    const T* end = value + std::min<int64_t>(8, count - start) * dim;
    for (const float* w = weights + start; value != end; value += dim, ++w) {
      typename L::V v[NV];
#pragma GCC unroll 8
      for (int c = 0; c < NV; ++c) v[c] = L::load(value + kLanes * c);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const float x = w[r * kScores];
#pragma GCC unroll 8
        for (int c = 0; c < NV; ++c) acc[r][c] += v[c] * x;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < NV; ++c) L::store(out + r * dim + d + kLanes * c, acc[r][c]);
  }
}

template <int MR, int kLanes, class T>
AXPO_INLINE void value_rows(const float* weights, const T* values, const int64_t* at, int64_t count, int64_t dim,
                            float* out) {
  constexpr int kWide = MR == 1 ? 8 : MR == 2 ? 4 : 2;  // fills the registers
  int64_t d = 0;
  for (; d + kLanes * kWide <= dim; d += kLanes * kWide) {
    value_block<MR, kWide, kLanes>(weights, values, at, count, d, dim, out);
  }
  for (; d < dim; d += 8) value_block<MR, 1, 8>(weights, values, at, count, d, dim, out);
}

// Calls f.run<MR>(r) for blocks of MR <= kBlock rows from r that cover 0 .. rows - 1, and between() before each: there
// memory is fetched ahead, a little at a time, as the processor waits when too many lines are under way.
template <int kBlock, class F, class Between>
AXPO_INLINE void for_row_blocks(int64_t rows, const F& f, Between&& between) {
  int64_t r = 0;
  for (; r + kBlock <= rows; r += kBlock) {
    between();
    f.template run<kBlock>(r);
  }
  if (r == rows) return;
  between();
  switch (rows - r) {
    case 1: return f.template run<1>(r);
    case 2: return f.template run<2>(r);
    case 3: return f.template run<3>(r);
    case 4: return f.template run<4>(r);
    case 5: return f.template run<5>(r);
    default: break;
  }
  if constexpr (kBlock > 6) {
    if (rows - r == 6) return f.template run<6>(r);
    f.template run<7>(r);
  }
}

template <class T>
struct FewScores {
  const float* q;
  int64_t row_total;
  const T* keys;
  const int64_t* at;
  int64_t octets, dim;
  float* scores;
  template <int MR>
  AXPO_INLINE void run(int64_t r) const {
    score_few<MR>(q + r * kStrip, row_total, keys, at, octets, dim, scores + r * kScores);
  }
};

template <int kLanes>
struct PackedScores {
  const float* q;
  int64_t row_total;
  const float* keys;
  int64_t dim;
  float* scores;
  template <int MR>
  AXPO_INLINE void run(int64_t r) const {
    score_packed<MR, kLanes>(q + r * kStrip, row_total, keys, dim, scores + r * kScores);
  }
};

template <int kLanes, class T>
struct WeightedValues {
  const float* weights;
  const T* values;
  const int64_t* at;
  int64_t count, dim;
  float* out;
  template <int MR>
  AXPO_INLINE void run(int64_t r) const {
    value_rows<MR, kLanes>(weights + r * kScores, values, at, count, dim, out + r * dim);
  }
};

// Scores to weights: row[0 .. seen) becomes 2^(score - maximum), row[seen .. width) zeros; width is a multiple of 8.
// The sum runs over eight lanes at any vector width.
template <int kLanes>
AXPO_INLINE void softmax_row(float* row, int64_t seen, int64_t width, float* peak, float* sum) {
  using L = Lanes<kLanes>;
  const int64_t full = seen / 8 * 8, wide = full / kLanes * kLanes;
  typename L::V tops = kNegInf - typename L::V{};
  for (int64_t j = 0; j < wide; j += kLanes) {
    const typename L::V v = L::load(row + j);
    tops = tops > v ? tops : v;
  }
  f32x8 m = splat8(kNegInf);
  if constexpr (kLanes == 16) {
    float both[16];
    L::store(both, tops);
    m = max8(load8(both), load8(both + 8));
    if (wide < full) m = max8(m, load8(row + wide));
  } else {
    m = tops;
  }
  if (full < seen) {
    const i32x8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const f32x8 masked = lane < static_cast<int32_t>(seen - full) ? load8(row + full) : splat8(kNegInf);
    store8(row + full, masked);
    m = max8(m, masked);
  }
  *peak = hmax8(m);
  f32x8 total = splat8(0.0f);
  int64_t j = 0;
  for (const typename L::V base = *peak - typename L::V{}; j < wide; j += kLanes) {
    L::store(row + j, exp2_lanes(L::load(row + j) - base));
    for (int64_t i = 0; i < kLanes; i += 8) total += load8(row + j + i);
  }
  const f32x8 base = splat8(*peak);
  for (; j < seen; j += 8) {
    const f32x8 w = exp2_lanes(load8(row + j) - base);
    store8(row + j, w);
    total += w;
  }
  for (; j < width; j += 8) store8(row + j, splat8(0.0f));
  *sum = sum8(total);
}

// What `attend` multiplies with: vectors of kLanes floats. Rows of q are kept in strips, scaled.
template <int kVectorLanes, class T>
struct VectorProducts {
  using Element = T;
  static constexpr int kLanes = kVectorLanes;
  const Cache<T>& c;
  Prefetcher<T>& ahead;
  int64_t row_total;
  float *q, *panel;

  static int64_t padded(int64_t rows) { return (rows + 7) / 8 * 8; }
  static int64_t query_floats(int64_t row_total, int64_t dim) { return row_total * strips(dim) * kStrip; }
  static int64_t panel_floats(int64_t dim) { return strips(dim) * kStrip * kGroup; }

  AXPO_INLINE void begin() {}
  AXPO_INLINE void end() {}

  AXPO_INLINE void query(int64_t r, const T* from) {
    const f32x8 factor = splat8(c.scale * kLog2e);
    for (int64_t d = 0; d < strips(c.dim) * kStrip; d += 8) {
      store8(q + (d / kStrip * row_total + r) * kStrip + d % kStrip,
             d < c.dim ? Lanes<8>::load(from + d) * factor : splat8(0.0f));
    }
  }

  // scores[r][key] of a run, to base 2.
  AXPO_INLINE void score(const Run& run, float* scores) {
    const int64_t octets = (run.count + 7) / 8;
    const float* run_q = q + run.row * kStrip;
    if (run.rows <= kFew) {
      const FewScores<T> product{run_q, row_total, c.k, run.at, octets, c.dim, scores};
      return for_row_blocks<kFew>(run.rows, product, Spread<T>{ahead, run.count / 2, 1});
    }
    constexpr int64_t kPanel = kLanes / 4;  // octets
    const int64_t blocks = (run.rows + kRegisterRows<kLanes> - 1) / kRegisterRows<kLanes>;
    Spread<T> fetch{ahead, run.count / 2, blocks * ((octets + kPanel - 1) / kPanel)};
    for (int64_t o = 0; o < octets; o += kPanel) {
      pack_keys<kLanes>(c.k, run.at + o, c.dim, panel);
      const PackedScores<kLanes> product{run_q, row_total, panel, c.dim, scores + 8 * o};
      for_row_blocks<kRegisterRows<kLanes>>(run.rows, product, fetch);
    }
  }

  AXPO_INLINE void weights(float*, int64_t) {}

  // out[r][0 .. dim) += the run's values by their weights.
  AXPO_INLINE void value(const Run& run, const float* weights, float* out) {
    const int64_t blocks = (run.rows + kRegisterRows<kLanes> - 1) / kRegisterRows<kLanes>;
    Spread<T> fetch{ahead, run.count - run.count / 2, blocks};
    if constexpr (!std::is_same_v<T, float>) {
      if (run.rows > kFew) {  // read by several blocks of rows: widened once
        int64_t at[kGroup / 8];
        widen_values<kLanes>(c.v, run, c.dim, panel, at);
        const WeightedValues<kLanes, float> product{weights, panel, at, run.count, c.dim, out};
        return for_row_blocks<kRegisterRows<kLanes>>(run.rows, product, fetch);
      }
    }
    const WeightedValues<kLanes, T> product{weights, c.v, run.at, run.count, c.dim, out};
    for_row_blocks<kRegisterRows<kLanes>>(run.rows, product, fetch);
  }
};

}  // namespace

// Tiles of a matrix unit for products of bf16: AMX instructions, or the same arithmetic in portable C++.
//
// There are eight tile registers of up to 16 rows of 64 bytes. A product adds A [rows, 32] times B [32, 16] of bf16 to
// C [rows, 16] of fp32; B is given in pairs, as [16][16][2]: two neighbouring k of one column side by side.
#pragma once

#include <cfloat>

#include "lanes.h"

// The assembler must know the instructions; compilers that bring their header come with such a one.
#if defined(AXPO_WIDE_TARGET) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define AXPO_AMX 1
#endif

namespace axpo {

enum class MatrixUnit { kNone, kAmx, kEmulated };

// What serves products of bf16 in this process: AMX if the processor and the kernel have it and AXPO_AMX does not say
// otherwise. Chosen once. See matrix_unit.cpp.
MatrixUnit matrix_unit();

constexpr int64_t kMatrixRows = 16;  // rows, and columns of 32 bits, of a tile
constexpr int64_t kMatrixDepth = 32;   // bf16 of a row: what one product adds up

// The tile registers, T = 0 .. 7. `configure` gives registers 0 to 5 `rows` rows and 6 and 7 sixteen, and clears all.
// load and store: rows are `stride` bytes apart, 64 bytes each. dot: C += A B.
struct EmulatedUnit {
  alignas(64) uint32_t tile[8][16][16];
  int64_t rows = 0;

  AXPO_INLINE void configure(int64_t count) {
    rows = count;
    std::memset(tile, 0, sizeof tile);
  }
  AXPO_INLINE void release() {}

  template <int T>
  AXPO_INLINE int64_t rows_of() const {
    return T < 6 ? rows : 16;
  }
  template <int T>
  AXPO_INLINE void zero() {
    std::memset(tile[T], 0, sizeof tile[T]);
  }
  template <int T>
  AXPO_INLINE void load(const void* from, int64_t stride) {
    zero<T>();
    for (int64_t r = 0; r < rows_of<T>(); ++r) std::memcpy(tile[T][r], static_cast<const char*>(from) + r * stride, 64);
  }
  template <int T>
  AXPO_INLINE void store(void* to, int64_t stride) const {
    for (int64_t r = 0; r < rows_of<T>(); ++r) std::memcpy(static_cast<char*>(to) + r * stride, tile[T][r], 64);
  }

  // TDPBF16PS as Intel's manual has it: even and odd k are two chains of multiply-adds from zero, each rounded once;
  // their sum is added to C. Denormal operands and results are zeros.
  template <int C, int A, int B>
  AXPO_INLINE void dot() {
    static_assert(C < 6 && A < 6 && B >= 5, "configure(rows) describes C, A and B");
    for (int64_t m = 0; m < rows; ++m) {
      float sums[2][16] = {};
      for (int64_t k = 0; k < 16; ++k) {
        for (int odd = 0; odd < 2; ++odd) {
          const float a = value(tile[A][m][k], odd);
          for (int64_t n = 0; n < 16; ++n) sums[odd][n] = multiply_add(a, value(tile[B][k][n], odd), sums[odd][n]);
        }
      }
      for (int64_t n = 0; n < 16; ++n) {
        const float sum = flush(flush(number(tile[C][m][n])) + flush(sums[0][n] + sums[1][n]));
        std::memcpy(&tile[C][m][n], &sum, 4);
      }
    }
  }

 private:
  static AXPO_INLINE float number(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  static AXPO_INLINE float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }
  static AXPO_INLINE float value(uint32_t pair, int odd) { return flush(number(odd ? pair & 0xffff0000u : pair << 16)); }
  static AXPO_INLINE float multiply_add(float a, float b, float c) {
    const float r = std::fma(a, b, c);
    if (std::fabs(r) > FLT_MIN || !(std::fabs(r) > 0)) return r;
    // Too small is what lies below the normal range after rounding to 24 bits, of which the result may have lost some.
    const double exact = std::fma(static_cast<double>(a), static_cast<double>(b), static_cast<double>(c));
    return std::fabs(exact) < FLT_MIN * (1 - 0x1p-25) ? std::copysign(0.0f, r) : r;
  }
};

#ifdef AXPO_AMX
struct AmxUnit {
  AXPO_INLINE void configure(int64_t count) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = 64;
      config.rows[t] = static_cast<uint8_t>(t < 6 ? count : 16);
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  AXPO_INLINE void release() { asm volatile("tilerelease"); }
  template <int T>
  AXPO_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  AXPO_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  AXPO_INLINE void store(void* to, int64_t stride) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
  }
  template <int C, int A, int B>
  AXPO_INLINE void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};
#endif

}  // namespace axpo

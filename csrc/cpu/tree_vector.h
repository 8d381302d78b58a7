// Vectors of 8 or 16 floats for tree attention: the same tile code is compiled for 256 and for 512 bits.
#pragma once

#include "attention.h"

namespace axpo {

// The register tile of a product: kBlock rows times two vectors. With 512 bits and 32 registers the two vectors are
// different strips (or panels) of 16 floats; with 256 bits and 16 registers they are the two halves of one.
struct Narrow : Lanes<8> {
  static constexpr int kLanes = 8, kBlock = 6, kPair = 1;  // kPair: strips or panels that a register tile spans
};
struct Wide : Lanes<16> {
  static constexpr int kLanes = 16, kBlock = 12, kPair = 2;
};

// acc[r][n] += sum over k < 16 of a[r * kRow + k * kStep] * b_n[k * 16 ..], in the order of k.
template <class Isa, int MR, int kRow, int kStep>
static AXPO_INLINE void fma16_pair(typename Isa::V (&acc)[MR][2], const float* a, const float* b0, const float* b1) {
#pragma GCC unroll 4
  for (int k = 0; k < 16; ++k) {
    const typename Isa::V v0 = Isa::load(b0 + 16 * k), v1 = Isa::load(b1 + 16 * k);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const float x = a[r * kRow + k * kStep];
      acc[r][0] += v0 * x;
      acc[r][1] += v1 * x;
    }
  }
}

}  // namespace axpo

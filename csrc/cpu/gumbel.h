// Counter-based Gumbel noise and the argmax with it. See kernels/sampling/reference.py. To be included behind
// softmax_row.h, which turns fused multiply-add off.
#pragma once

#include "softmax_row.h"

namespace axpo {

constexpr int64_t kBlock = 64;          // tokens whose noise is made together: 16 Philox calls
constexpr float kLargestNoise = 23.0f;  // the noise is at most -log(2^-33) = 22.9

// Philox4x32-10 (Salmon et al., SC'11), counter = (block, 0, position low, position high), key = seed.
// A loop over independent counters, which the compiler turns into one vector lane each.
static AXPO_INLINE void philox16(uint32_t block, uint64_t position, uint64_t seed, uint32_t* __restrict out) {
  for (int lane = 0; lane < 16; ++lane) {
    uint32_t a = block + lane, b = 0, c = (uint32_t)position, d = (uint32_t)(position >> 32);
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t x = (uint64_t)0xD2511F53u * a, y = (uint64_t)0xCD9E8D57u * c;
      a = (uint32_t)(y >> 32) ^ b ^ key0, b = (uint32_t)y;
      c = (uint32_t)(x >> 32) ^ d ^ key1, d = (uint32_t)x;
      key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    out[4 * lane] = a, out[4 * lane + 1] = b, out[4 * lane + 2] = c, out[4 * lane + 3] = d;
  }
}

// log(1 + f) for |f| <= 0.42 by 2 atanh(f / (2 + f)), relative error below 3e-7 also where f is tiny.
static AXPO_INLINE f32x8 log_near_one(f32x8 f) {
  const f32x8 s = f / (f + splat8(2.0f)), z = s * s;
  f32x8 p = splat8(0.22222222f);
  p = p * z + splat8(0.28571429f);
  p = p * z + splat8(0.40000001f);
  p = p * z + splat8(0.66666669f);
  p = p * z + splat8(2.0f);
  return s * p;
}

// x = 2^k m with m in [sqrt(1/2), sqrt(2)).
static AXPO_INLINE void split8(f32x8 x, f32x8* k, f32x8* m) {
  const i32x8 bits = reinterpret_cast<i32x8>(x), e = (bits - 0x3f3504f3) >> 23;
  *k = __builtin_convertvector(e, f32x8);
  *m = reinterpret_cast<f32x8>(bits - (e << 23));
}

// One Gumbel variable a word: -log(-log(1 - v)), v = (w + 1/2) 2^-32 rounded to fp32 and kept below 1.
static AXPO_INLINE f32x8 gumbel8(const uint32_t* words) {
  i32x8 w;
  std::memcpy(&w, words, sizeof w);
  const f32x8 high = __builtin_convertvector((w >> 16) & 0xffff, f32x8), low = __builtin_convertvector(w & 0xffff, f32x8);
  f32x8 v = ((high * splat8(65536.0f) + low) + splat8(0.5f)) * splat8(2.3283064e-10f);
  v = v < splat8(0.99999994f) ? v : splat8(0.99999994f);
  const f32x8 ln2 = splat8(0.69314718f), zero = splat8(0.0f), one = splat8(1.0f);
  f32x8 k, m;
  split8(one - v, &k, &m);
  const f32x8 f = k == zero ? -v : m - one;  // 1 - v has lost the digits of a small v
  const f32x8 exponential = -(k * ln2 + log_near_one(f));
  split8(exponential, &k, &m);
  return -(k * ln2 + log_near_one(m - one));
}

// Index of the largest z + noise, the lowest on ties, -1 when all z are -inf; *best becomes that sum. z is of the tokens
// from `first` on, a multiple of kBlock, and padded with -inf to whole blocks. A block that cannot win even with the
// largest noise gets none; the one with the largest z goes first.
static AXPO_INLINE int64_t gumbel_argmax(const float* z, int64_t n, int64_t first, uint64_t seed, uint64_t position,
                                         float* best_sum) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  int64_t start = 0, winner = -1;
  float top = -kInfinity, best = -kInfinity;
  const auto block_max = [z](int64_t b) __attribute__((always_inline)) {
    f32x8 m = load8(z + b * kBlock);
    for (int64_t i = 8; i < kBlock; i += 8) m = max8(m, load8(z + b * kBlock + i));
    return hmax8(m);
  };
  for (int64_t b = 0; b < blocks; ++b) {
    const float m = block_max(b);
    if (m > top) top = m, start = b;
  }
  if (top == -kInfinity) return -1;
  alignas(32) uint32_t words[kBlock];
  alignas(32) float noisy[kBlock];
  for (int64_t step = 0; step <= blocks; ++step) {
    const int64_t b = step == 0 ? start : step - 1;
    if (step > 0 && (b == start || block_max(b) + kLargestNoise < best)) continue;
    philox16((uint32_t)(first / 4 + b * (kBlock / 4)), position, seed, words);
    f32x8 m = splat8(-kInfinity);
    for (int64_t i = 0; i < kBlock; i += 8) {
      const f32x8 v = load8(z + b * kBlock + i) + gumbel8(words + i);
      store8(noisy + i, v);
      m = max8(m, v);
    }
    const float block_best = hmax8(m);
    if (block_best < best || block_best == -kInfinity || (block_best == best && b * kBlock > winner)) continue;
    for (int64_t i = 0; i < kBlock; ++i) {
      if (noisy[i] == block_best) {
        winner = b * kBlock + i;
        break;
      }
    }
    best = block_best;
  }
  *best_sum = best;
  return winner;
}

}  // namespace axpo

// Counter-based Gumbel noise and the argmax with it. See kernels/sampling/reference.py. To be included behind
// softmax_row.h, which turns fused multiply-add off.
#pragma once

#include "softmax_row.h"

namespace axpo {

constexpr int64_t kBlock = 64;          // tokens whose noise is made together: 16 Philox calls
constexpr float kLargestNoise = 23.0f;  // the noise is at most -log(2^-33) = 22.9

// Philox4x32-10 (Salmon et al., SC'11), counter = (block, 0, position low, position high), key = seed.
// Sixteen counters at once, kept as two vectors of eight, whose products of 32 by 32 bits the processor has.
typedef uint64_t u64x8 __attribute__((vector_size(64)));

template <class Multiply>
static AXPO_INLINE void philox16(uint32_t block, uint64_t position, uint64_t seed, uint32_t* __restrict out,
                                 Multiply multiply) {
  const u64x8 low = u64x8{} + 0xffffffffu, lane = {0, 1, 2, 3, 4, 5, 6, 7};
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    u64x8 a = lane + (uint64_t)(block + 8 * half), b = {}, c = b + (uint64_t)(uint32_t)position, d = b + (position >> 32);
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const u64x8 x = multiply(a, 0xD2511F53u), y = multiply(c, 0xCD9E8D57u);
      a = (y >> 32) ^ b ^ (uint64_t)key0, b = y & low;
      c = (x >> 32) ^ d ^ (uint64_t)key1, d = x & low;
      key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    // Every lane's four words lie one behind the other.
    const u64x8 ab = a | b << 32, cd = c | d << 32;
    const u64x8 first = __builtin_shuffle(ab, cd, u64x8{0, 8, 1, 9, 2, 10, 3, 11});
    const u64x8 second = __builtin_shuffle(ab, cd, u64x8{4, 12, 5, 13, 6, 14, 7, 15});
    std::memcpy(out + 32 * half, &first, sizeof first);
    std::memcpy(out + 32 * half + 16, &second, sizeof second);
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

// Words of at least this give a noise below `noise`: -log(-log(1 - v)) >= noise asks for v <= 1 - e^(-e^-noise). With a
// margin for rounding; 2^32 - 1 where any word may do.
static AXPO_INLINE uint32_t words_above(float noise) {
  if (noise < -3.0f) return 0xffffffffu;
  const double v = -std::expm1(-std::exp(-(double)noise)) * 1.0001 + 1e-9;
  return v >= 1.0 ? 0xffffffffu : (uint32_t)(v * 4294967296.0);
}

// The largest of a whole block's z.
static AXPO_INLINE float block_max(const float* z) {
  f32x8 m = load8(z);
  for (int64_t i = 8; i < kBlock; i += 8) m = max8(m, load8(z + i));
  return hmax8(m);
}

// Index of the largest z, the lowest on ties, -1 when all are -inf; z [n] is padded with -inf to whole blocks.
static AXPO_INLINE int64_t first_largest(const float* z, int64_t n) {
  int64_t start = -1;
  float top = -kInfinity;
  for (int64_t b = 0; b < n; b += kBlock) {
    const float m = block_max(z + b);
    if (m > top) top = m, start = b;
  }
  return start < 0 ? -1 : std::find(z + start, z + n, top) - z;
}

// Index of the largest z + noise, the lowest on ties, -1 when all z are -inf; *best_sum becomes that sum. z is of the
// tokens from `first` on, a multiple of kBlock, and padded with -inf to whole blocks.
// A block that cannot win even with the largest noise gets none; the one with the largest z goes first. Of a block, only
// the tokens whose random word can lift the block's largest z above the best so far have their noise computed.
template <class Multiply>
static AXPO_INLINE int64_t argmax_of(const float* z, int64_t n, int64_t first, uint64_t seed, uint64_t position,
                                     float* best_sum, Multiply multiply) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  int64_t start = 0, winner = -1;
  float top = -kInfinity, best = -kInfinity;
  for (int64_t b = 0; b < blocks; ++b) {
    const float m = block_max(z + b * kBlock);
    if (m > top) top = m, start = b;
  }
  if (top == -kInfinity) return -1;
  alignas(64) uint32_t words[kBlock];
  for (int64_t step = 0; step <= blocks; ++step) {
    const int64_t b = step == 0 ? start : step - 1;
    if (step > 0 && b == start) continue;
    const float high = block_max(z + b * kBlock);
    if (high == -kInfinity || high + kLargestNoise < best) continue;
    philox16((uint32_t)(first / 4 + b * (kBlock / 4)), position, seed, words, multiply);
    const uint32_t limit = best == -kInfinity ? 0xffffffffu : words_above(best - high - 1e-3f);
    for (int64_t i = 0; i < kBlock; i += 8) {
      uint32_t lowest = words[i];
      for (int64_t j = 1; j < 8; ++j) lowest = words[i + j] < lowest ? words[i + j] : lowest;
      if (lowest > limit) continue;
      const f32x8 noisy = load8(z + b * kBlock + i) + gumbel8(words + i);
      const float here = hmax8(noisy);
      const int64_t at = b * kBlock + i;
      if (here < best || here == -kInfinity || (here == best && at > winner)) continue;
      int64_t j = 0;
      while (noisy[j] != here) ++j;
      winner = at + j;
      best = here;
    }
  }
  *best_sum = best;
  return winner;
}

struct Multiply {
  AXPO_INLINE u64x8 operator()(u64x8 a, uint32_t b) const { return a * (uint64_t)b; }
};
AXPO_CLONES static int64_t argmax_any(const float* z, int64_t n, int64_t first, uint64_t seed, uint64_t position,
                                      float* best) {
  return argmax_of(z, n, first, seed, position, best, Multiply());
}

#ifdef AXPO_WIDE_TARGET
struct MultiplyWide {  // the compiler would multiply all 64 bits, which takes three instructions
  AXPO_INLINE u64x8 operator()(u64x8 a, uint32_t b) const {
    const u64x8 factor = u64x8{} + (uint64_t)b;
    u64x8 product;
    asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(a), "v"(factor));
    return product;
  }
};
AXPO_WIDE static int64_t argmax_wide(const float* z, int64_t n, int64_t first, uint64_t seed, uint64_t position,
                                     float* best) {
  return argmax_of(z, n, first, seed, position, best, MultiplyWide());
}
#else
static int64_t argmax_wide(const float*, int64_t, int64_t, uint64_t, uint64_t, float*) { return -1; }
#endif

static int64_t gumbel_argmax(const float* z, int64_t n, int64_t first, uint64_t seed, uint64_t position, float* best) {
  return has_wide_vectors() ? argmax_wide(z, n, first, seed, position, best) : argmax_any(z, n, first, seed, position, best);
}

}  // namespace axpo

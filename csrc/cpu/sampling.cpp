// Sampling by counter-based Gumbel-max with top-k, top-p, min-p and banned ids. See kernels/sampling/reference.py, which
// defines every value that decides on a token; both use only operations that are rounded once (no fused multiply-add, no
// libm), so the tokens agree bit for bit on any machine.
#include "softmax_row.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "rows.h"

namespace {
using namespace axpo;
using at::Tensor;

constexpr int64_t kBlock = 64;         // tokens whose noise is made together: 16 Philox calls
constexpr float kLargestNoise = 23.0f;  // the noise is at most -log(2^-33) = 22.9

struct Params {
  uint64_t seed, position;
  float temperature, top_p, min_p;
  int64_t top_k;
};

// --- noise -----------------------------------------------------------------------------------------------------------

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

// Index of the largest z + noise, the lowest on ties, -1 when all z are -inf. z is padded with -inf to whole blocks.
// A block that cannot win even with the largest noise gets none; the one with the largest z goes first. Of a block, only
// the tokens whose random word can lift the block's largest z above the best so far have their noise computed.
template <class Multiply>
static AXPO_INLINE int64_t argmax_of(const float* z, int64_t n, uint64_t seed, uint64_t position, Multiply multiply) {
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
  alignas(64) uint32_t words[kBlock];
  for (int64_t step = 0; step <= blocks; ++step) {
    const int64_t b = step == 0 ? start : step - 1;
    if (step > 0 && b == start) continue;
    const float high = block_max(b);
    if (high == -kInfinity || high + kLargestNoise < best) continue;
    philox16((uint32_t)(b * (kBlock / 4)), position, seed, words, multiply);
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
  return winner;
}

struct Multiply {
  AXPO_INLINE u64x8 operator()(u64x8 a, uint32_t b) const { return a * (uint64_t)b; }
};
AXPO_CLONES int64_t argmax_any(const float* z, int64_t n, uint64_t seed, uint64_t position) {
  return argmax_of(z, n, seed, position, Multiply());
}

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && __GNUC__ >= 12
struct MultiplyWide {  // the compiler would multiply all 64 bits, which takes three instructions
  AXPO_INLINE u64x8 operator()(u64x8 a, uint32_t b) const {
    const u64x8 factor = u64x8{} + (uint64_t)b;
    u64x8 product;
    asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(a), "v"(factor));
    return product;
  }
};
__attribute__((target("arch=x86-64-v4"))) int64_t argmax_wide(const float* z, int64_t n, uint64_t seed,
                                                               uint64_t position) {
  return argmax_of(z, n, seed, position, MultiplyWide());
}
bool has_wide() { return __builtin_cpu_supports("x86-64-v4"); }
#else
int64_t argmax_wide(const float*, int64_t, uint64_t, uint64_t) { return -1; }
bool has_wide() { return false; }
#endif

int64_t gumbel_argmax(const float* z, int64_t n, uint64_t seed, uint64_t position) {
  static const bool wide = has_wide();
  return wide ? argmax_wide(z, n, seed, position) : argmax_any(z, n, seed, position);
}

// --- truncation ------------------------------------------------------------------------------------------------------

// Sorts by z downwards, then by index upwards, as one integer.
uint64_t order_key(float z, int64_t index) {
  uint32_t bits;
  z += 0.0f;  // -0 becomes +0
  std::memcpy(&bits, &z, sizeof bits);
  bits = bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
  return (uint64_t)bits << 32 | (uint64_t)index;
}

// Probabilities in units of 2^-40 of the largest one: integers add up to the same sum in any order.
AXPO_CLONES void weights(const float* z, float max, uint64_t* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    const f32x8 e = exp8(load8(z + i) - splat8(max)) * splat8(1099511627776.0f);
    for (int64_t j = 0; j < 8; ++j) out[i + j] = (uint64_t)e[j];
  }
}

// Sets z to -inf where e^(z - max) is below min_p. z is padded to whole vectors.
AXPO_CLONES void keep_min_p(float* z, int64_t n, float max, float min_p) {
  const f32x8 m = splat8(max), least = splat8(min_p), nothing = splat8(-kInfinity);
  for (int64_t i = 0; i < n; i += 8) {
    const f32x8 v = load8(z + i);
    store8(z + i, exp8(v - m) < least ? nothing : v);
  }
}

// Sets z to -inf outside the top_k largest (all that tie with the k-th stay).
void keep_top_k(std::vector<float>& z, int64_t n, int64_t top_k, std::vector<float>& scratch) {
  if (top_k <= 0 || top_k >= n) return;
  scratch.assign(z.begin(), z.begin() + n);
  std::nth_element(scratch.begin(), scratch.begin() + top_k - 1, scratch.end(), std::greater<float>());
  const float threshold = scratch[top_k - 1];
  for (int64_t i = 0; i < n; ++i) z[i] = z[i] < threshold ? -kInfinity : z[i];
}

// Buckets of 1/8 nat below the largest logit, and one for the rest: which one a token falls in never breaks the order.
constexpr int64_t kBuckets = 129;

static AXPO_INLINE int64_t bucket_of(float max, float z) {
  const float below = max - z;
  return below < 16.0f ? (int64_t)(below * 8.0f) : kBuckets - 1;
}

// Sets z to -inf outside the smallest set of most probable tokens whose mass reaches top_p of what is left. The last
// token kept is first narrowed down to a bucket, then within it by halving.
void keep_top_p(std::vector<float>& z, int64_t n, float max, float top_p, std::vector<uint64_t>& keys,
                std::vector<uint64_t>& weight) {
  weight.resize(z.size());
  weights(z.data(), max, weight.data(), (int64_t)z.size());
  uint64_t mass[kBuckets] = {}, total = 0, above = 0;
  for (int64_t i = 0; i < n; ++i) {
    mass[bucket_of(max, z[i])] += weight[i];
    total += weight[i];
  }
  const double need = (double)top_p * (double)total;
  int64_t bucket = 0;
  while (bucket < kBuckets - 1 && (double)(above + mass[bucket]) < need) above += mass[bucket++];
  keys.clear();
  for (int64_t i = 0; i < n; ++i) {
    if (bucket_of(max, z[i]) == bucket) keys.push_back(order_key(z[i], i));
  }
  auto low = keys.begin(), high = keys.end();
  while (high - low > 1) {
    const auto middle = low + (high - low) / 2;
    std::nth_element(low, middle, high);
    uint64_t half = 0;
    for (auto it = low; it != middle; ++it) half += weight[*it & 0xffffffffu];
    if ((double)(above + half) >= need) {
      high = middle;
    } else {
      above += half;
      low = middle;
    }
  }
  const float last = z[*low & 0xffffffffu];
  const int64_t last_index = *low & 0xffffffffu;
  for (int64_t i = 0; i < n; ++i) {
    if (z[i] < last || (z[i] == last && i > last_index)) z[i] = -kInfinity;
  }
}

// --- one row ---------------------------------------------------------------------------------------------------------

struct Scratch {
  std::vector<float> z, copy;
  std::vector<uint64_t> keys, weight;
};

AXPO_CLONES float row_statistics(const float* logits, float* z, int64_t n, float temperature, bool* invalid,
                                 double* sum, double* centred) {
  const float max = scale_row(logits, z, n, temperature, invalid);
  softmax_sums(z, n, max, sum, centred);
  return max;
}

int64_t first_argmax(const std::vector<float>& z, int64_t n) {
  const auto it = std::max_element(z.begin(), z.begin() + n);
  return *it == -kInfinity ? -1 : it - z.begin();
}

void sample_row(const float* logits, int64_t n, const Params& p, const int64_t* banned, int64_t banned_count,
                int64_t row, Scratch& scratch, int64_t* token, float* logprob, float* entropy) {
  std::vector<float>& z = scratch.z;
  const bool greedy = p.temperature == 0.0f;
  bool invalid;
  double sum, centred;
  const float max = row_statistics(logits, z.data(), n, greedy ? 1.0f : p.temperature, &invalid, &sum, &centred);
  TORCH_CHECK_VALUE(!invalid && sum > 0, "sample: row ", row,
                    " of logits holds a NaN or +inf, or only -inf: there is no distribution to sample from");
  std::fill(z.begin() + n, z.end(), -kInfinity);
  for (int64_t i = 0; i < banned_count; ++i) z[banned[i]] = -kInfinity;
  if (greedy) {
    *token = first_argmax(z, n);
  } else {
    const bool truncates = p.top_p < 1.0f || p.min_p > 0.0f;
    const int64_t top = truncates ? first_argmax(z, n) : -1;
    if (top >= 0 && p.min_p > 0.0f) keep_min_p(z.data(), n, z[top], p.min_p);
    keep_top_k(z, n, p.top_k, scratch.copy);
    if (top >= 0 && p.top_p < 1.0f) keep_top_p(z, n, z[top], p.top_p, scratch.keys, scratch.weight);
    *token = gumbel_argmax(z.data(), n, p.seed, p.position);
  }
  TORCH_CHECK_VALUE(*token >= 0, "sample: row ", row, " has no token left: every one is banned or has logit -inf");
  const double log_sum = std::log(sum), chosen = greedy ? logits[*token] : logits[*token] / p.temperature;
  *logprob = (float)((chosen - max) - log_sum);
  *entropy = (float)(log_sum - centred / sum);
}

std::tuple<Tensor, Tensor, Tensor> sample(const Tensor& logits, const Tensor& seeds, const Tensor& positions,
                                          const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                                          const std::optional<Tensor>& banned, const std::optional<Tensor>& min_p) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0, "sample: logits has shape ", logits.sizes(),
                    ": it must be [B, V] with V at least 1");
  const int64_t rows = logits.size(0), n = logits.size(1);
  for (const Tensor* t : {&seeds, &positions, &temperature, &top_k, &top_p}) {
    TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == rows, "sample: an argument has shape ", t->sizes(),
                      ", but seeds, positions, temperature, top_k and top_p need one entry for each of the ", rows,
                      " rows of logits");
  }
  TORCH_CHECK_VALUE(!min_p || (min_p->dim() == 1 && min_p->size(0) == rows), "sample: min_p must be None or hold one "
                    "entry for each of the ", rows, " rows of logits");
  const Tensor min_p_c = min_p ? min_p->contiguous() : Tensor();
  const float* least = min_p ? min_p_c.const_data_ptr<float>() : nullptr;
  for (int64_t r = 0; least && r < rows; ++r) {
    TORCH_CHECK_VALUE(least[r] >= 0.0f && least[r] <= 1.0f, "sample: min_p[", r, "] = ", least[r],
                      " must lie in [0, 1], where 0 is off");
  }
  const Tensor seeds_c = seeds.contiguous(), positions_c = positions.contiguous(), top_k_c = top_k.contiguous();
  const Tensor temperature_c = temperature.contiguous(), top_p_c = top_p.contiguous();
  const Tensor banned_c = banned ? banned->contiguous() : Tensor();
  const int64_t* ban = banned ? banned_c.const_data_ptr<int64_t>() : nullptr;
  const int64_t ban_count = banned ? banned_c.numel() : 0;
  for (int64_t i = 0; i < ban_count; ++i) {
    TORCH_CHECK_VALUE(ban[i] >= 0 && ban[i] < n, "sample: banned[", i, "] = ", ban[i],
                      " is outside the vocabulary of ", n);
  }
  const float *t = temperature_c.const_data_ptr<float>(), *p = top_p_c.const_data_ptr<float>();
  for (int64_t r = 0; r < rows; ++r) {
    TORCH_CHECK_VALUE(t[r] >= 0.0f, "sample: temperature[", r, "] = ", t[r], " must be 0 (greedy) or above");
  }
  Tensor token = at::empty({rows}, seeds.options());
  Tensor logprob = at::empty({rows}, logits.options()), entropy = at::empty({rows}, logits.options());
  const int64_t *seed = seeds_c.const_data_ptr<int64_t>(), *position = positions_c.const_data_ptr<int64_t>();
  const int64_t* k = top_k_c.const_data_ptr<int64_t>();
  int64_t* token_out = token.mutable_data_ptr<int64_t>();
  float *logprob_out = logprob.mutable_data_ptr<float>(), *entropy_out = entropy.mutable_data_ptr<float>();
  const Rows in = rows_of(logits);
  at::parallel_for(0, rows, grain_rows(n), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    scratch.z.resize((n + kBlock - 1) / kBlock * kBlock);
    for (int64_t r = begin; r < end; ++r) {
      sample_row(in[r], n, Params{(uint64_t)seed[r], (uint64_t)position[r], t[r], p[r], least ? least[r] : 0.0f, k[r]},
                 ban, ban_count, r, scratch, token_out + r, logprob_out + r, entropy_out + r);
    }
  });
  return {token, logprob, entropy};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(axpo, m) {
  m.def(
      "sample(Tensor logits, Tensor seeds, Tensor positions, Tensor temperature, Tensor top_k, Tensor top_p, "
      "Tensor? banned=None, Tensor? min_p=None) -> (Tensor, Tensor, Tensor)");
  m.impl("sample", c10::DispatchKey::CPU, TORCH_FN(sample));
}

"""Triton functions of the sampler: noise, exponential and order of reference.py, operation by operation.

Their kernels are compiled with fp_fusion off and divide by tl.div_rn, so each fp32 operation is rounded once, as in
reference.py and csrc/cpu/sampling.cpp, and the tokens agree bit for bit.
"""

# What a kernel's names are, Triton decides: its stubs describe the Python objects, not the compiled language.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import triton.language as tl

from kernels._triton import jit

LAST = tl.constexpr(2147483647)


@jit
def philox4x32(a, b, c, d, key0, key1):
    """Ten rounds of Philox on uint32 words; see the reference."""
    for _ in tl.static_range(10):
        x = a.to(tl.uint64) * 0xD2511F53  # one wide multiplication of two 32-bit words
        y = c.to(tl.uint64) * 0xCD9E8D57
        a, b = (y >> 32).to(tl.uint32) ^ b ^ key0, y.to(tl.uint32)
        c, d = (x >> 32).to(tl.uint32) ^ d ^ key1, x.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return a, b, c, d


@jit
def log_near_one(f):
    s = tl.div_rn(f, f + 2.0)
    z = s * s
    p = z * 0.2222222222222222 + 0.2857142857142857
    p = p * z + 0.4
    p = p * z + 0.6666666666666666
    p = p * z + 2.0
    return s * p


@jit
def split_exponent(x):
    """x = 2^k m with m in [sqrt(1/2), sqrt(2))."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    return k.to(tl.float32), (bits - (k << 23)).to(tl.float32, bitcast=True)


@jit
def gumbel(words):
    """One Gumbel variable a uint32 word; see gumbel_noise of the reference."""
    high, low = (words >> 16).to(tl.int32).to(tl.float32), (words & 0xFFFF).to(tl.int32).to(tl.float32)
    v = (high * 65536.0 + low + 0.5) * 2.3283064365386963e-10
    v = tl.minimum(v, 0.9999999403953552)
    k, m = split_exponent(1.0 - v)
    exponential = -(k * 0.6931471824645996 + log_near_one(tl.where(k == 0.0, -v, m - 1.0)))
    k, m = split_exponent(exponential)
    return -(k * 0.6931471824645996 + log_near_one(m - 1.0))


@jit
def gumbel_tile(seed, position, column, M: tl.constexpr, N: tl.constexpr):
    """[M, N] noise of tokens column, column + 1, … (column a multiple of 4) for seed, position [M] int64."""
    blocks = (column // 4 + tl.arange(0, N // 4)).to(tl.uint32)
    zero = tl.zeros([M, N // 4], tl.uint32)
    low = position.to(tl.uint32)[:, None] + zero
    high = (position >> 32).to(tl.uint32)[:, None] + zero
    key0 = seed.to(tl.uint32)[:, None] + zero
    key1 = (seed >> 32).to(tl.uint32)[:, None] + zero
    a, b, c, d = philox4x32(blocks[None, :] + zero, zero, low, high, key0, key1)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [..., i, j] is word 2 i + j
    return gumbel(tl.reshape(words, [M, N]))


@jit
def best_of(noisy, columns, logits):
    """(largest noisy score, its column, its logit) of each row [M, N]; the lowest column on ties."""
    best = tl.max(noisy, 1)
    token = tl.min(tl.where(noisy == best[:, None], columns[None, :], LAST), 1)
    return best, token, tl.sum(tl.where(columns[None, :] == token[:, None], logits, 0.0), 1)


@jit
def keep_better(best, token, logit, other_best, other_token, other_logit):
    """The first stays on ties: it must be the one of lower tokens."""
    better = other_best > best
    return (
        tl.where(better, other_best, best),
        tl.where(better, other_token, token),
        tl.where(better, other_logit, logit),
    )


@jit
def exp_rounded(x):
    """e^x for x <= 0: exp8 of csrc/cpu/common.h, operation by operation."""
    c = tl.where(x < -87.33654, -87.33654, x)
    shifted = c * 1.4426950408889634 + 12582912.0
    n = shifted - 12582912.0
    r = c - n * 0.693359375
    r = r - n * -2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = p * (r * r) + r + 1.0
    e = n.to(tl.int32)
    half = e >> 1
    y = p * ((half + 127) << 23).to(tl.float32, bitcast=True) * ((e - half + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.33654, 0.0, y)


@jit
def order_key(z):
    """int64 in [0, 2³²) that orders as z does; −0 and +0 share one."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True).to(tl.int64)

"""Triton functions of the LM head: a tile of logits, and the running state of a tile's rows.

Scores stay raw logits until the very end, so that d = (logit − largest) · scale has one rounding less than a difference
of scaled logits, and is exactly 0 at the largest. Exponentials are powers of two: scale = log2(e) / temperature.
"""

# What a kernel's names are, Triton decides: its stubs describe the Python objects, not the compiled language.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import triton.language as tl

from kernels._triton import jit

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Stands for −inf in differences: 2^−1000 is 0 in fp32, and 0 · −1000 is not NaN.
NOTHING = tl.constexpr(-1000.0)


@jit
def logits_tile(
    x,
    w,
    row,
    column,
    N,
    V,
    H,
    stride_x,
    stride_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] fp32 of x[row:] @ w[column:].T, summed over H in index order whatever the tile.

    Rows and columns outside the matrices hold something finite or not, never unreadable memory: mask them.
    TMA: x and w are tensor descriptors.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if TMA:
        for k in range(0, H, BLOCK_K):
            acc = tl.dot(x.load([row, k]), w.load([column, k]).T, acc, input_precision="ieee")
    else:
        rows = tl.minimum(row + tl.arange(0, BLOCK_M), N - 1).to(tl.int64)
        columns = tl.minimum(column + tl.arange(0, BLOCK_N), V - 1).to(tl.int64)
        ks = tl.arange(0, BLOCK_K)
        xs = x + rows[:, None] * stride_x + ks[None, :]
        ws = w + columns[None, :] * stride_w + ks[:, None]
        for k in range(0, H, BLOCK_K):
            a = tl.load(xs, mask=ks[None, :] < H - k, other=0.0)
            b = tl.load(ws, mask=ks[:, None] < H - k, other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            xs += BLOCK_K
            ws += BLOCK_K
    return acc


@jit
def below(x, largest, scale):
    """(x − largest) · scale, kept above NOTHING, which −inf is even below −inf; NaN stays."""
    d = (x - tl.where(largest == -float("inf"), 0.0, largest)) * scale
    return tl.where(d < NOTHING, NOTHING, d)


@jit
def row_state(logits, scale):
    """(largest, excess, centred) of each row of logits [M, C], −inf where there is none.

    excess is Σ 2^d − 1, summed without the largest's own 2^0: next to it a small rest would lose its digits.
    centred is Σ 2^d d.
    """
    largest = tl.max(logits, 1)
    d = below(logits, largest[:, None], scale[:, None])
    e = tl.exp2(d)
    excess = tl.sum(tl.where(d == 0.0, 0.0, e), 1) + (tl.sum(tl.where(d == 0.0, 1.0, 0.0), 1) - 1.0)
    return largest, excess, tl.sum(e * d, 1)


@jit
def merge_state(largest, excess, centred, other_largest, other_excess, other_centred, scale):
    """The state of both parts of a row. One without columns is (−inf, −1, 0)."""
    new = tl.maximum(largest, other_largest)
    shift, other_shift = below(largest, new, scale), below(other_largest, new, scale)
    shift, other_shift = tl.where(new == largest, 0.0, shift), tl.where(new == other_largest, 0.0, other_shift)
    a, b = tl.exp2(shift), tl.exp2(other_shift)
    sum_, other_sum = excess + 1.0, other_excess + 1.0
    # Of a and b one is 1 and keeps its excess as it is.
    new_excess = tl.where(other_largest > largest, other_excess + a * sum_, excess + b * other_sum)
    new_centred = a * (centred + sum_ * shift) + b * (other_centred + other_sum * other_shift)
    return new, new_excess, new_centred

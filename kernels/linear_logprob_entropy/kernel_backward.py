"""Triton kernel of the LM head's backward: recomputes tiles of logits and turns them into their gradient."""

# What a kernel's names are, Triton decides: its stubs describe the Python objects, not the compiled language.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import triton.language as tl

from kernels._triton import jit
from kernels.linear_logprob_entropy.device import LN2, LOG2E, NOTHING, logits_tile


@jit
def expm1(x):
    """e^x − 1 for x <= 0."""
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(x > -0.35, near, tl.exp2(x * LOG2E) - 1.0)


@jit
def _halves(x, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of x [M, N]."""
    return tl.split(tl.permute(tl.reshape(x, [M, 2, N // 2]), [0, 2, 1]))


@jit(do_not_specialize=["N", "first", "ignore_index"])
def dlogits_kernel(
    x,
    w,
    temperature,
    labels,
    logprob,
    entropy,
    maximum,
    log_sum,
    grad_logprob,
    grad_entropy,
    out,
    N,
    C,
    H,
    stride_x,
    stride_w,
    first,
    ignore_index,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """out [N, C] = (g_logprob (1[j = label] − p) − g_entropy p (log p + entropy)) / T of columns first, first + 1, …

    p comes from maximum (the largest logit of the whole vocabulary) and log_sum. Everything is fp32 until the store.
    Rows labelled ignore_index become 0 whatever they hold.
    """
    row_tiles, column_tiles = tl.cdiv(N, BLOCK_M), tl.cdiv(C, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * column_tiles)
    width = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    row = (group * GROUP + within % width) * BLOCK_M
    column = within // width * BLOCK_N
    logits = logits_tile(x, w, row, column, N, C, H, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, TMA)

    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < N
    t = tl.load(temperature + rows, mask=inside, other=1.0)
    label = tl.load(labels + rows, mask=inside, other=ignore_index)
    lp = tl.load(logprob + rows, mask=inside, other=0.0)
    h = tl.load(entropy + rows, mask=inside, other=0.0)
    largest = tl.load(maximum + rows, mask=inside, other=0.0)
    rest = tl.load(log_sum + rows, mask=inside, other=0.0)
    gl = tl.load(grad_logprob + rows, mask=inside, other=0.0)
    gh = tl.load(grad_entropy + rows, mask=inside, other=0.0)
    lp = tl.where(lp < NOTHING, NOTHING, lp)
    # 1 − p by expm1: the plain difference has no correct digit left when p is close to 1.
    at_label = (-gl * expm1(lp) - gh * tl.exp2(lp * LOG2E) * (lp + h)) / t
    constant, slope = (gl + gh * h) / t, gh * LN2 / t

    scale, rest2 = 1.0 / t * LOG2E, rest * LOG2E
    # A quarter of the columns at a time: in one piece, what is held beside the logits does not fit the registers.
    left, right = _halves(logits, BLOCK_M, BLOCK_N)
    quarters = _halves(left, BLOCK_M, BLOCK_N // 2) + _halves(right, BLOCK_M, BLOCK_N // 2)
    for part in tl.static_range(4):
        log2p = (quarters[part] - largest[:, None]) * scale[:, None] - rest2[:, None]
        log2p = tl.where(log2p < NOTHING, NOTHING, log2p)
        dz = -tl.exp2(log2p) * (constant[:, None] + slope[:, None] * log2p)
        columns = column + part * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        dz = tl.where((first + columns)[None, :] == label[:, None], at_label[:, None], dz)
        dz = tl.where((label != ignore_index)[:, None], dz, 0.0)
        at = out + rows.to(tl.int64)[:, None] * C + columns[None, :]
        tl.store(at, dz.to(out.dtype.element_ty), mask=inside[:, None] & (columns < C)[None, :])

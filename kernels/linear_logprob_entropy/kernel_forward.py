"""Triton kernels of the LM head's forward: tiles of logits to partial states, and the merge of a row's partials.

With SAMPLE the same pass also draws a token: it adds the sampler's noise to every logit and keeps the best.
"""

# What a kernel's names are, Triton decides: its stubs describe the Python objects, not the compiled language.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import triton.language as tl

from kernels._triton import jit
from kernels.linear_logprob_entropy.device import LN2, LOG2E, logits_tile, merge_state, row_state
from kernels.sampling.device import best_of, gumbel_tile, keep_better


# fp_fusion off: the noise must be the reference's bit for bit, and then the other case keeps the same bits.
@jit(fp_fusion=False, do_not_specialize=["N", "vocab_start", "splits"])
def tiles_kernel(
    x,
    w,
    temperature,
    labels,
    at_label,
    partial,
    seeds,
    positions,
    banned,
    best_token,
    N,
    V,
    H,
    stride_x,
    stride_w,
    vocab_start,
    splits,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    SAMPLE: tl.constexpr,
    BANNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: BLOCK_M rows × a split of TILES tiles of BLOCK_N columns.

    partial [3 or 5, splits, N] fp32: largest, excess, centred, and with SAMPLE the best noisy score and its logit.
    at_label [N] (preset to −inf): the label's logit, written by the split that holds it. best_token [splits, N] int32.
    Programs go through GROUP row tiles before the next split: these rows stay in L2 while the weight streams by once.
    """
    row_tiles = tl.cdiv(N, BLOCK_M)
    program = tl.program_id(0)
    group = program // (GROUP * splits)
    width = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * splits)
    row = (group * GROUP + within % width) * BLOCK_M
    split = within // width

    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < N
    t = tl.load(temperature + rows, mask=inside, other=1.0)
    greedy = t == 0.0
    t = tl.where(greedy, 1.0, t)
    scale = 1.0 / t * LOG2E
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    excess = tl.full([BLOCK_M], -1.0, tl.float32)
    centred = tl.zeros([BLOCK_M], tl.float32)
    if SAMPLE:
        seed = tl.load(seeds + rows, mask=inside, other=0)
        position = tl.load(positions + rows, mask=inside, other=0)
        best = tl.full([BLOCK_M], -float("inf"), tl.float32)
        token = tl.zeros([BLOCK_M], tl.int32)
        best_logit = tl.zeros([BLOCK_M], tl.float32)
    else:
        label = tl.load(labels + rows, mask=inside, other=-1) - vocab_start

    first = split * TILES * BLOCK_N
    for tile in range(tl.minimum(TILES, tl.cdiv(V - first, BLOCK_N))):
        column = first + tile * BLOCK_N
        logits = logits_tile(x, w, row, column, N, V, H, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        columns = column + tl.arange(0, BLOCK_N)
        logits = tl.where(columns[None, :] < V, logits, -float("inf"))
        if SAMPLE:
            noise = gumbel_tile(seed, position, column, BLOCK_M, BLOCK_N)
            noisy = tl.div_rn(logits, tl.broadcast_to(t[:, None], [BLOCK_M, BLOCK_N]))
            noisy += tl.where(greedy[:, None], 0.0, noise)
            if BANNED:
                allowed = tl.load(banned + columns, mask=columns < V, other=1) == 0
                noisy = tl.where(allowed[None, :], noisy, -float("inf"))
            best, token, best_logit = keep_better(best, token, best_logit, *best_of(noisy, columns, logits))
        else:
            here = (label >= column) & (label < tl.minimum(column + BLOCK_N, V))
            if tl.max(here.to(tl.int32), 0) > 0:
                hit = columns[None, :] == label[:, None]
                tl.store(at_label + rows, tl.sum(tl.where(hit, logits, 0.0), 1), mask=here)
        largest, excess, centred = merge_state(largest, excess, centred, *row_state(logits, scale), scale)

    plane = splits.to(tl.int64) * N
    out = partial + split.to(tl.int64) * N + rows
    tl.store(out, largest, mask=inside)
    tl.store(out + plane, excess, mask=inside)
    tl.store(out + 2 * plane, centred, mask=inside)
    if SAMPLE:
        tl.store(out + 3 * plane, best, mask=inside)
        tl.store(out + 4 * plane, best_logit, mask=inside)
        tl.store(best_token + split.to(tl.int64) * N + rows, token, mask=inside)


@jit(fp_fusion=False, do_not_specialize=["N", "first", "first_split", "splits", "vocab_start", "columns_of_split"])
def rows_kernel(
    logits,
    temperature,
    labels,
    at_label,
    partial,
    N,
    V,
    stride,
    first,
    first_split,
    splits,
    vocab_start,
    columns_of_split,
    BLOCK: tl.constexpr,
):
    """tiles_kernel's partials of logits that a matrix product has written: [N, C] fp32, column 0 being `first`.

    One program: one row × one split. columns_of_split is at most BLOCK.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale = 1.0 / tl.load(temperature + row) * LOG2E
    begin = split * columns_of_split
    offsets = begin + tl.arange(0, BLOCK)
    inside = (tl.arange(0, BLOCK) < columns_of_split) & (first + offsets < V)
    z = tl.load(logits + row * stride + offsets, mask=inside, other=-float("inf"))
    largest, excess, centred = row_state(z[None, :], tl.full([1], 1.0, tl.float32) * scale)
    one = tl.arange(0, 1)
    plane = splits.to(tl.int64) * N
    out = partial + (first_split + split).to(tl.int64) * N + row + one
    tl.store(out, largest)
    tl.store(out + plane, excess)
    tl.store(out + 2 * plane, centred)
    label = tl.load(labels + row) - vocab_start - first
    if (label >= begin) & (label < begin + columns_of_split) & (first + label < V):
        tl.store(at_label + row, tl.load(logits + row * stride + label))


@jit(fp_fusion=False, do_not_specialize=["N", "splits", "ignore_index"])
def merge_kernel(
    partial,
    temperature,
    labels,
    at_label,
    best_token,
    logprob,
    entropy,
    maximum,
    log_sum,
    state,
    tokens,
    N,
    splits,
    ignore_index,
    SAMPLE: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merges each row's partials in fp64, BLOCK_S splits at a time in index order.

    Writes state [N, 4] fp64 (with STATE), or logprob, entropy, the largest logit and log Σ e^{z−max}, each [N] fp32.
    With SAMPLE: token, logprob and entropy; a row that has no distribution gets −1, NaN and NaN, and one that has no
    token left −1.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < N
    plane = splits.to(tl.int64) * N
    t = tl.load(temperature + rows, mask=inside, other=1.0)
    if SAMPLE:
        t = tl.where(t == 0.0, 1.0, t)
    t = t.to(tl.float64)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        here = (s < splits)[:, None] & inside[None, :]
        at = partial + s.to(tl.int64)[:, None] * N + rows[None, :]
        largest = tl.maximum(largest, tl.max(tl.load(at, mask=here, other=-float("inf")), 0))

    total = tl.zeros([BLOCK_M], tl.float64)
    centred = tl.zeros([BLOCK_M], tl.float64)
    if SAMPLE:
        best = tl.full([BLOCK_M], -float("inf"), tl.float32)
        token = tl.zeros([BLOCK_M], tl.int32)
        best_logit = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        here = (s < splits)[:, None] & inside[None, :]
        at = partial + s.to(tl.int64)[:, None] * N + rows[None, :]
        m = tl.load(at, mask=here, other=-float("inf"))
        sum_ = tl.load(at + plane, mask=here, other=-1.0).to(tl.float64) + 1.0
        c = tl.load(at + 2 * plane, mask=here, other=0.0).to(tl.float64) * LN2
        shift = tl.where(m == largest[None, :], 0.0, (m - largest[None, :]).to(tl.float64) / t[None, :])
        shift = tl.where(shift < -700.0, -700.0, shift)
        a = tl.where(m == -float("inf"), 0.0, tl.exp(shift))
        total += tl.sum(a * sum_, 0)
        centred += tl.sum(a * (c + sum_ * shift), 0)
        if SAMPLE:
            score = tl.load(at + 3 * plane, mask=here, other=-float("inf"))
            logit = tl.load(at + 4 * plane, mask=here, other=0.0)
            where = best_token + s.to(tl.int64)[:, None] * N + rows[None, :]
            candidate = tl.load(where, mask=here, other=2147483647)
            top = tl.max(score, 0)
            lowest = tl.min(tl.where(score == top[None, :], candidate, 2147483647), 0)
            clean = tl.sum(tl.where(candidate == lowest[None, :], logit, 0.0), 0)
            best, token, best_logit = keep_better(best, token, best_logit, top, lowest, clean)

    log_total = tl.log(total)
    h = log_total - centred / total
    if SAMPLE:
        chosen = (best > -float("inf")) & (total == total)
        tl.store(tokens + rows, tl.where(chosen, token, -1).to(tl.int64), mask=inside)
        lp = (best_logit - largest).to(tl.float64) / t - log_total
        tl.store(logprob + rows, tl.where(chosen, lp, float("nan")).to(tl.float32), mask=inside)
        tl.store(entropy + rows, h.to(tl.float32), mask=inside)
    else:
        picked = tl.load(at_label + rows, mask=inside, other=0.0)
        if STATE:
            out = state + rows.to(tl.int64) * 4
            tl.store(out, largest.to(tl.float64) / t, mask=inside)
            tl.store(out + 1, total, mask=inside)
            tl.store(out + 2, centred, mask=inside)
            tl.store(out + 3, picked.to(tl.float64) / t, mask=inside)
        else:
            valid = tl.load(labels + rows, mask=inside, other=0) != ignore_index
            lp = (picked - largest).to(tl.float64) / t - log_total
            tl.store(logprob + rows, tl.where(valid, lp, 0.0).to(tl.float32), mask=inside)
            tl.store(entropy + rows, tl.where(valid, h, 0.0).to(tl.float32), mask=inside)
            tl.store(maximum + rows, largest, mask=inside)
            tl.store(log_sum + rows, log_total.to(tl.float32), mask=inside)

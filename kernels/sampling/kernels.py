"""Triton kernels of sample: where top-k and top-p cut a row, and the draw from what is left."""

# What a kernel's names are, Triton decides: its stubs describe the Python objects, not the compiled language.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import triton.language as tl

from kernels._triton import jit
from kernels.linear_logprob_entropy.device import LOG2E, row_state
from kernels.sampling.device import best_of, exp_rounded, gumbel_tile, order_key

NONE = tl.constexpr(-float("inf"))


@jit
def left_over(row, ids, t, banned, V, BANNED: tl.constexpr):
    """logits / t of the tokens `ids` of a row; −inf where banned or outside the vocabulary."""
    inside = ids < V
    logits = tl.load(row + ids, mask=inside, other=NONE)
    z = tl.div_rn(logits, t + tl.zeros_like(logits))
    if BANNED:
        z = tl.where(tl.load(banned + ids, mask=inside, other=1) == 0, z, NONE)
    return z


@jit
def keep_min_p(z, top, least, MIN_P: tl.constexpr):
    """z, −inf where e^(z − top) is below `least`."""
    if MIN_P:
        z = tl.where(exp_rounded(z - top) < least, NONE, z)
    return z


@jit
def mass_of(z, top):
    """Probability in units of 2⁻⁴⁰ of the largest one, int64: sums do not depend on the order of adding."""
    return (exp_rounded(z - top) * 1099511627776.0).to(tl.int64)


@jit
def weights_of(z, ids, top, floor, V, MASS: tl.constexpr):
    """What the search adds up: the tokens' masses, without those that order below `floor`; or 1 a token."""
    if MASS:
        return tl.where((ids < V) & (order_key(z) >= floor), mass_of(z, top), 0)
    return (ids < V).to(tl.int64)


@jit
def search(row, t, banned, V, top, least, floor, need, MASS: tl.constexpr, MIN_P: tl.constexpr, BANNED: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """The largest order key K such that the tokens with a key of at least K weigh something and at least `need` (fp64).

    Two bits of K a pass from the highest down: of the three keys that could extend what is known, the largest that
    still leaves enough above it.
    """
    known = tl.full([], 0, tl.int64)
    for step in range(16):
        unit = tl.full([], 1, tl.int64) << (30 - 2 * step)
        sum1 = tl.zeros([BLOCK], tl.int64)
        sum2 = tl.zeros([BLOCK], tl.int64)
        sum3 = tl.zeros([BLOCK], tl.int64)
        for start in range(0, V, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            z = keep_min_p(left_over(row, ids, t, banned, V, BANNED), top, least, MIN_P)
            weight = weights_of(z, ids, top, floor, V, MASS)
            key = order_key(z)
            sum1 += tl.where(key >= known + unit, weight, 0)
            sum2 += tl.where(key >= known + 2 * unit, weight, 0)
            sum3 += tl.where(key >= known + 3 * unit, weight, 0)
        one, two, three = tl.sum(sum1, 0), tl.sum(sum2, 0), tl.sum(sum3, 0)
        digit = ((one > 0) & (one.to(tl.float64) >= need)).to(tl.int64)
        digit += ((two > 0) & (two.to(tl.float64) >= need)).to(tl.int64)
        digit += ((three > 0) & (three.to(tl.float64) >= need)).to(tl.int64)
        known += digit * unit
    return known


@jit(fp_fusion=False)
def cut_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    banned,
    cut,
    last,
    top,
    V,
    stride,
    MIN_P: tl.constexpr,
    BANNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: the tokens to keep are those with z above cut, and of those with z = cut the ids up to last.

    z is logits / temperature without the banned ids and top (written too) the largest; min-p is applied beside this.
    """
    program = tl.program_id(0)
    row = logits + program.to(tl.int64) * stride
    t = tl.load(temperature + program)
    k = tl.load(top_k + program)
    p = tl.load(top_p + program)
    by_count = (k > 0) & (k < V) & (t > 0.0)
    by_mass = (p < 1.0) & (t > 0.0)
    t = tl.where(t == 0.0, 1.0, t)
    least = tl.full([], 0.0, tl.float32)
    if MIN_P:
        least = tl.load(min_p + program)

    highest = tl.full([], NONE, tl.float32)
    if by_count | by_mass | (least > 0.0):
        peaks = tl.full([BLOCK], NONE, tl.float32)
        for start in range(0, V, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            peaks = tl.maximum(peaks, left_over(row, ids, t, banned, V, BANNED))
        highest = tl.max(peaks, 0)

    key = tl.full([], 0, tl.int64)
    final = tl.full([], 0, tl.int32) + V
    if by_count:
        key = search(row, t, banned, V, highest, least, key, k.to(tl.float64), False, MIN_P, BANNED, BLOCK)
    if by_mass:
        floor = key
        masses = tl.zeros([BLOCK], tl.int64)
        for start in range(0, V, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            z = keep_min_p(left_over(row, ids, t, banned, V, BANNED), highest, least, MIN_P)
            masses += weights_of(z, ids, highest, floor, V, True)
        need = p.to(tl.float64) * tl.sum(masses, 0).to(tl.float64)
        key = search(row, t, banned, V, highest, least, floor, need, True, MIN_P, BANNED, BLOCK)

        # Of the tokens that tie at the cut, those stay before which there is less than the mass needed.
        masses = tl.zeros([BLOCK], tl.int64)
        for start in range(0, V, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            z = keep_min_p(left_over(row, ids, t, banned, V, BANNED), highest, least, MIN_P)
            masses += tl.where(order_key(z) > key, weights_of(z, ids, highest, floor, V, True), 0)
        before = tl.sum(masses, 0)
        first = before == 0  # the most probable token always stays
        final = tl.full([], 0, tl.int32)
        for start in range(0, V, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            z = keep_min_p(left_over(row, ids, t, banned, V, BANNED), highest, least, MIN_P)
            tied = (order_key(z) == key) & (ids < V)
            weight = tl.where(tied, mass_of(z, highest), 0)
            ahead = before + tl.cumsum(weight, 0) - weight
            stays = tied & ((ahead.to(tl.float64) < need) | (first & (ahead == 0)))
            final = tl.maximum(final, tl.max(tl.where(stays, ids, 0), 0))
            before += tl.sum(weight, 0)

    bits = tl.where(key >= 2147483648, key - 2147483648, 4294967295 - key).to(tl.uint32).to(tl.int32, bitcast=True)
    z_cut = tl.where(by_count | by_mass, bits.to(tl.float32, bitcast=True), NONE)
    tl.store(cut + program, z_cut)
    tl.store(last + program, final)
    tl.store(top + program, highest)


@jit(fp_fusion=False, do_not_specialize=["N", "splits"])
def draw_kernel(
    logits,
    seeds,
    positions,
    temperature,
    min_p,
    banned,
    cut,
    last,
    top,
    partial,
    best_token,
    N,
    V,
    stride,
    splits,
    MIN_P: tl.constexpr,
    BANNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: a row and BLOCK tokens. Writes what the LM head's tiles_kernel writes with SAMPLE."""
    program, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    one = tl.arange(0, 1)
    row = logits + program * stride
    t = tl.load(temperature + program)
    greedy = t == 0.0
    t = tl.where(greedy, 1.0, t)
    column = split * BLOCK
    ids = column + tl.arange(0, BLOCK)
    raw = tl.load(row + ids, mask=ids < V, other=NONE)
    scale = tl.full([1], 1.0, tl.float32) / t * LOG2E
    largest, excess, centred = row_state(raw[None, :], scale)

    z = left_over(row, ids, t, banned, V, BANNED)
    if not greedy:
        if MIN_P:
            z = keep_min_p(z, tl.load(top + program), tl.load(min_p + program), MIN_P)
        edge = tl.load(cut + program)
        z = tl.where((z > edge) | ((z == edge) & (ids <= tl.load(last + program))), z, NONE)
        seed, position = tl.load(seeds + program + one), tl.load(positions + program + one)
        z += tl.reshape(gumbel_tile(seed, position, column, 1, BLOCK), [BLOCK])
    best, token, logit = best_of(z[None, :], ids, raw[None, :])

    plane = splits.to(tl.int64) * N
    out = partial + split.to(tl.int64) * N + program + one
    tl.store(out, largest)
    tl.store(out + plane, excess)
    tl.store(out + 2 * plane, centred)
    tl.store(out + 3 * plane, best)
    tl.store(out + 4 * plane, logit)
    tl.store(best_token + split.to(tl.int64) * N + program + one, token)

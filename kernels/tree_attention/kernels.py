"""The Triton kernels of tree attention: forward; dQ; dK and dV. Launched by triton.py.

Scores are kept in base 2 (log2(e) is part of `scale2`), accumulators in fp32; products of fp32 tensors are fp32. A
block that every query sees whole takes no mask; in the others a pair is visible iff key <= query < subtree_end[key].
q, k, v and grad_out come as tensor descriptors of [T, heads · DIM], which the tensor memory accelerator of sm_90 reads
without a pointer a thread, and fills up with zeros behind the last token.
"""

import triton.language as tl

from kernels._triton import jit

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@jit
def _store(x, value, first, head, heads, tokens, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Rows first … of one head of x [T, heads, DIM] = value; offsets within the block fit 32 bits, its own 64."""
    row, stride = tl.arange(0, ROWS), heads * DIM
    at = x + first.to(tl.int64) * stride + head * DIM + row[:, None] * stride + tl.arange(0, DIM)[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=(first + row < tokens)[:, None])


@jit
def _visible(query, key, subtree_end, tokens):
    """[queries, keys] if query is [queries, 1] and key [1, keys], or the other way round."""
    end = tl.load(subtree_end + key, mask=key < tokens, other=0).to(tl.int32)
    return (key <= query) & (query < end)


@jit
def _attend(
    acc, peak, total, q, k, v, column, subtree_end, query, key, tokens, scale2, MASKED: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """One block of keys into the running maximum, sum and weighted values of the queries."""
    scores = tl.dot(q, k.load([key, column]).T, input_precision="ieee")
    if MASKED:
        visible = _visible(query[:, None], key + tl.arange(0, KEYS)[None, :], subtree_end, tokens)
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1) * scale2)
    base = higher
    if MASKED:  # a row that has seen nothing yet subtracts 0 instead of minus infinity from itself
        base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.math.exp2(scores * scale2 - base[:, None])
    decay = tl.math.exp2(peak - base)
    total = total * decay + tl.sum(weights, 1)
    v_block = v.load([key, column])
    acc = tl.dot(weights.to(v_block.dtype), v_block, acc * decay[:, None], input_precision="ieee")
    return acc, higher, total


@jit(do_not_specialize=["tokens", "capacity"])
def forward(
    q, k, v, subtree_end, spans, counts, out, lse, tokens, capacity, scale2,
    GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (Hq, query blocks): the last, heaviest blocks first. out [T, Hq, D]; lse [Hq, T], natural."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    first = block * ROWS
    query = first + tl.arange(0, ROWS)
    column = head // GROUP * DIM
    q_block = q.load([first, head * DIM])
    acc = tl.zeros((ROWS, DIM), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for kind in tl.static_range(2):  # pyright: ignore
        span = spans + (block * 2 + kind).to(tl.int64) * capacity * 2
        for _ in range(tl.load(counts + block * 2 + kind)):
            start, stop = tl.load(span), tl.load(span + 1)
            span += 2
            for key in tl.range(start * KEYS, stop * KEYS, KEYS, num_stages=1 if kind else None):  # pyright: ignore
                acc, peak, total = _attend(
                    acc, peak, total, q_block, k, v, column, subtree_end, query, key, tokens, scale2, kind == 1, KEYS
                )
    total = tl.where(query < tokens, total, 1.0)  # a row behind the last token has seen nothing
    _store(out, acc / total[:, None], first, head, heads, tokens, ROWS, DIM)
    natural = (peak + tl.math.log2(total)) * LN2
    tl.store(lse + head.to(tl.int64) * tokens + query, natural, mask=query < tokens)


@jit
def _query_gradient(
    acc, q, grad_out, lse2, delta, k, v, column, subtree_end, query, key, tokens, scale2,
    MASKED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    k_block = k.load([key, column])
    scores = tl.dot(q, k_block.T, input_precision="ieee")
    of_weights = tl.dot(grad_out, v.load([key, column]).T, input_precision="ieee")
    if MASKED:
        visible = _visible(query[:, None], key + tl.arange(0, KEYS)[None, :], subtree_end, tokens)
        scores = tl.where(visible, scores, float("-inf"))
    weights = tl.math.exp2(scores * scale2 - lse2[:, None])
    of_scores = weights * (of_weights - delta[:, None])
    return tl.dot(of_scores.to(k_block.dtype), k_block, acc, input_precision="ieee")


@jit(do_not_specialize=["tokens", "capacity"])
def query_gradient(
    grad_out, out, q, k, v, subtree_end, spans, counts, lse, delta, grad_q, tokens, capacity, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (Hq, query blocks). Also writes delta [Hq, T], the sum over d of out · grad_out, for key_gradient."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    first = block * ROWS
    query = first + tl.arange(0, ROWS)
    column = head // GROUP * DIM
    g_block = grad_out.load([first, head * DIM])
    shift = tl.sum(out.load([first, head * DIM]).to(tl.float32) * g_block.to(tl.float32), 1)
    per_query = head.to(tl.int64) * tokens + query
    tl.store(delta + per_query, shift, mask=query < tokens)
    lse2 = tl.load(lse + per_query, mask=query < tokens, other=0.0) * LOG2E
    q_block = q.load([first, head * DIM])
    scale2 = scale * LOG2E
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for kind in tl.static_range(2):  # pyright: ignore
        span = spans + (block * 2 + kind).to(tl.int64) * capacity * 2
        for _ in range(tl.load(counts + block * 2 + kind)):
            start, stop = tl.load(span), tl.load(span + 1)
            span += 2
            for key in tl.range(start * KEYS, stop * KEYS, KEYS, num_stages=1 if kind else None):  # pyright: ignore
                acc = _query_gradient(
                    acc, q_block, g_block, lse2, shift, k, v, column, subtree_end, query, key, tokens, scale2,
                    kind == 1, KEYS,
                )  # fmt: skip
    _store(grad_q, acc * scale, first, head, heads, tokens, ROWS, DIM)


@jit
def _key_gradient(
    of_k, of_v, k, v, q, grad_out, lse, delta, end, key, head, first, tokens, scale2,
    MASKED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    query = first + tl.arange(0, ROWS)
    q_block, g_block = q.load([first, head * DIM]), grad_out.load([first, head * DIM])
    lse += head.to(tl.int64) * tokens
    delta += head.to(tl.int64) * tokens
    inside = query < tokens if MASKED else None
    other = 0.0 if MASKED else None
    scores = tl.dot(k, q_block.T, input_precision="ieee")
    lse2 = tl.load(lse + query, mask=inside, other=other) * LOG2E
    if MASKED:
        visible = (key[:, None] <= query[None, :]) & (query[None, :] < end[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    weights = tl.math.exp2(scores * scale2 - lse2[None, :])
    of_v = tl.dot(weights.to(g_block.dtype), g_block, of_v, input_precision="ieee")
    of_weights = tl.dot(v, g_block.T, input_precision="ieee")
    shift = tl.load(delta + query, mask=inside, other=other)
    of_scores = weights * (of_weights - shift[None, :])
    of_k = tl.dot(of_scores.to(q_block.dtype), q_block, of_k, input_precision="ieee")
    return of_k, of_v


@jit(do_not_specialize=["tokens"])
def key_gradient(
    grad_out, q, k, v, subtree_end, lse, delta, grad_k, grad_v, tokens, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (Hk, key blocks): the first, most seen blocks first. All query heads of the group are summed here, in order.

    The queries that see a key are one range, and so are those that see some key of a block: no plan is needed. Those
    from the block's last key to its smallest subtree_end see all of it.
    """
    kv_head, kv_heads = tl.program_id(0), tl.num_programs(0)
    first_key = tl.program_id(1) * KEYS
    key = first_key + tl.arange(0, KEYS)
    end = tl.load(subtree_end + key, mask=key < tokens, other=0).to(tl.int32)
    k_block, v_block = k.load([first_key, kv_head * DIM]), v.load([first_key, kv_head * DIM])
    stop = tl.cdiv(tl.max(end, 0), ROWS)
    full_start = tl.minimum(tl.cdiv(first_key + KEYS - 1, ROWS), stop)
    full_stop = tl.maximum(tl.min(end, 0) // ROWS, full_start)
    start = first_key // ROWS
    before = full_start - start
    scale2 = scale * LOG2E
    of_k = tl.zeros((KEYS, DIM), tl.float32)
    of_v = tl.zeros((KEYS, DIM), tl.float32)
    full, masked = full_stop - full_start, before + stop - full_stop
    for n in range(GROUP * full):
        of_k, of_v = _key_gradient(
            of_k, of_v, k_block, v_block, q, grad_out, lse, delta, end, key, kv_head * GROUP + n // full,
            (full_start + n % full) * ROWS, tokens, scale2, False, ROWS, DIM,
        )  # fmt: skip
    for n in range(GROUP * masked):
        block = n % masked  # of those before the full ones, then those behind
        block += tl.where(block < before, start, full_stop - before)
        of_k, of_v = _key_gradient(
            of_k, of_v, k_block, v_block, q, grad_out, lse, delta, end, key, kv_head * GROUP + n // masked,
            block * ROWS, tokens, scale2, True, ROWS, DIM,
        )  # fmt: skip
    _store(grad_k, of_k * scale, first_key, kv_head, kv_heads, tokens, KEYS, DIM)
    _store(grad_v, of_v, first_key, kv_head, kv_heads, tokens, KEYS, DIM)

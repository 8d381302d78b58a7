"""Attention of packed queries over a paged KV cache: prefill, extend and decode in one call."""

import torch

from kernels._library import LOADED, use_cpp


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal attention of each sequence's last tokens over all of its tokens. Returns [T, Hq, D] in the dtype of q.

    q: [T, Hq, D]. k_cache, v_cache: [num_blocks, Hk, block_size, D], Hq a multiple of Hk (query head h reads KV head
    h * Hk // Hq); the queries' own keys and values are already written. block_tables: [S, max_blocks] int32.
    Sequence s owns query rows cu_seqlens_q[s]:cu_seqlens_q[s + 1] ([S + 1] int32, from 0 to T), the last of which is
    at absolute position context_lens[s] - 1 ([S] int32); a query at position p sees positions 0..p.
    scale: factor on the scores before the softmax.

    A row's result depends on nothing but its own query and the keys and values it sees: not on the batch, not on how
    a prefill was cut, not on the number of threads. Raises ValueError for shapes or lengths that do not fit.
    """
    _check(q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens)
    if use_cpp(q, k_cache, v_cache) and q.shape[2] % 8 == 0 and q.shape[2] <= 256 and k_cache.shape[2] % 8 == 0:
        return torch.ops.axpo.paged_attention(q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, scale)
    return paged_attention_reference(q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, scale)


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """paged_attention in plain torch, sequence by sequence, any device and dtype; softmax in at least fp32."""
    block_size, group = k_cache.shape[2], q.shape[1] // k_cache.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q)
    starts, lengths = cu_seqlens_q.tolist(), context_lens.tolist()
    for s, context in enumerate(lengths):
        begin, end = starts[s], starts[s + 1]
        if begin == end:
            continue
        blocks = block_tables[s, : -(-context // block_size)].long()
        keys, values = (
            cache[blocks].transpose(1, 2).flatten(0, 1)[:context].to(compute).repeat_interleave(group, dim=1)
            for cache in (k_cache, v_cache)
        )  # [context, Hq, D]
        position = torch.arange(context, device=q.device)
        visible = position[None, :] <= position[context - (end - begin) :, None]
        scores = torch.einsum("ihd,jhd->hij", q[begin:end].to(compute), keys) * scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        out[begin:end] = torch.einsum("hij,jhd->ihd", weights, values).to(q.dtype)
    return out


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
) -> None:
    if q.dim() != 3 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape or q.shape[2] != k_cache.shape[3]:
        raise ValueError(
            f"paged_attention: q {tuple(q.shape)} must be [T, Hq, D], and k_cache {tuple(k_cache.shape)} and v_cache "
            f"{tuple(v_cache.shape)} [num_blocks, Hk, block_size, D] with the same D"
        )
    if k_cache.shape[1] == 0 or q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"paged_attention: {q.shape[1]} query heads are not a multiple of {k_cache.shape[1]} KV heads")
    sequences = context_lens.shape[0]
    if block_tables.dim() != 2 or block_tables.shape[0] != sequences or cu_seqlens_q.shape != (sequences + 1,):
        raise ValueError(
            f"paged_attention: with context_lens {tuple(context_lens.shape)} = [S], block_tables "
            f"{tuple(block_tables.shape)} must be [S, max_blocks] and cu_seqlens_q {tuple(cu_seqlens_q.shape)} [S + 1]"
        )
    for name, tensor in (
        ("block_tables", block_tables),
        ("cu_seqlens_q", cu_seqlens_q),
        ("context_lens", context_lens),
    ):
        if tensor.dtype != torch.int32:
            raise ValueError(f"paged_attention: {name} is {tensor.dtype}: convert it to int32")


if LOADED:

    @torch.library.register_fake("axpo::paged_attention")
    def _fake(q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, scale):
        return q.new_empty(q.shape)

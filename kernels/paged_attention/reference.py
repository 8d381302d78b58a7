"""Paged attention in plain torch, sequence by sequence: what the compiled kernels are held to."""

import torch


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """paged_attention on any device and in any dtype; softmax in at least fp32."""
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

"""tree_attention in plain torch, any device and dtype: a dense mask, and softmax in at least fp32."""

import torch


def tree_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, subtree_end: torch.Tensor, scale: float
) -> torch.Tensor:
    """What kernels.tree_attention.tree_attention returns, with the whole [Hq, T, T] scores in memory."""
    tokens, heads, _ = q.shape
    compute = torch.promote_types(q.dtype, torch.float32)
    group = heads // k.shape[1]
    index = torch.arange(tokens, device=q.device)
    if bool(((subtree_end <= index) | (subtree_end > tokens)).any()):
        raise ValueError(f"tree_attention: every subtree_end[t] must lie in t + 1 .. {tokens}")
    visible = (index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[None, :])  # [query, key]
    keys = k.to(compute).repeat_interleave(group, dim=1)
    values = v.to(compute).repeat_interleave(group, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q.to(compute), keys) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hij,jhd->ihd", weights, values).to(q.dtype)

"""Packages that need a GPU, in plain torch and only as far as their documentation says what arguments mean.

What a backend hands over is right when these, reading it as documented, attend as the reference does. Whether the
packages themselves do is for a GPU to say: bench/gpu_suite.py runs those that are installed there.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """q [n, Hq, D], k, v [m, Hk, D] -> [n, Hq, D]; a causal mask is aligned to the bottom right corner."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale
    if causal:
        visible = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)


def _paged(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """cache [blocks, page, Hk, D] -> [length, Hk, D]."""
    return cache[table.long()].flatten(0, 1)[:length]


def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, block_table, softmax_scale, causal):
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    out = torch.empty_like(q)
    for row, (table, length) in enumerate(zip(block_table, cache_seqlens.tolist(), strict=True)):
        keys, values = (_paged(cache, table, length) for cache in (k_cache, v_cache))
        out[row] = _attend(q[row], keys, values, softmax_scale, causal)
    return out


def flash_attn_varlen_func(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, block_table
):
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == block_table.dtype == torch.int32
    assert cu_seqlens_q.diff().max() == max_seqlen_q and cu_seqlens_k.diff().max() == max_seqlen_k
    assert cu_seqlens_q[0] == cu_seqlens_k[0] == 0 and cu_seqlens_q[-1] == len(q)
    out = torch.empty_like(q)
    for row, (table, length) in enumerate(zip(block_table, cu_seqlens_k.diff().tolist(), strict=True)):
        rows = slice(int(cu_seqlens_q[row]), int(cu_seqlens_q[row + 1]))
        keys, values = (_paged(cache, table, length) for cache in (k, v))
        out[rows] = _attend(q[rows], keys, values, softmax_scale, causal)
    return out


flash_attn = SimpleNamespace(
    flash_attn_with_kvcache=flash_attn_with_kvcache, flash_attn_varlen_func=flash_attn_varlen_func
)


@dataclass
class PagedMask:
    q_seqlen: list[int]
    kv_seqlen: list[int]
    block_tables: Tensor
    page_size: int

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen, block_tables, page_size, *, device):
        assert block_tables.dtype == torch.int32 and len(q_seqlen) == len(kv_seqlen) == len(block_tables)
        return cls(q_seqlen, kv_seqlen, block_tables, page_size)


@dataclass
class CausalMask:
    q_seqlen: list[int]
    kv_seqlen: list[int]

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen, *, device):
        return cls(q_seqlen, kv_seqlen)


def memory_efficient_attention_forward(query, key, value, attn_bias, scale, op=None):
    """query [1, T, G, H, D], key and value [1, S, G, H, D]: head h of group g attends to head h of group g."""
    assert query.shape[2:] == key.shape[2:] == value.shape[2:], "heads of a group are expanded by the caller"
    assert sum(attn_bias.q_seqlen) == query.shape[1]
    q, k, v = (x[0].flatten(1, 2) for x in (query, key, value))
    out, row, at = torch.empty_like(q), 0, 0
    for i, (count, length) in enumerate(zip(attn_bias.q_seqlen, attn_bias.kv_seqlen, strict=True)):
        if isinstance(attn_bias, PagedMask):
            assert op == "triton_splitk"
            keys, values = (
                _paged(x.unflatten(0, (-1, attn_bias.page_size)), attn_bias.block_tables[i], length) for x in (k, v)
            )
        else:
            keys, values = k[at : at + length], v[at : at + length]
            at += length
        out[row : row + count] = _attend(q[row : row + count], keys, values, scale, causal=True)
        row += count
    return out.view(query.shape)


fmha = SimpleNamespace(
    memory_efficient_attention_forward=memory_efficient_attention_forward,
    attn_bias=SimpleNamespace(
        PagedBlockDiagonalCausalWithOffsetPaddedKeysMask=PagedMask, BlockDiagonalCausalFromBottomRightMask=CausalMask
    ),
    triton_splitk=SimpleNamespace(FwOp="triton_splitk"),
)

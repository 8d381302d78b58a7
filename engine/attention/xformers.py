"""The xformers package: decoding rows by its paged split-K operator, chunks over gathered keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from engine.attention.backend import StepAttention, leading_single
from engine.attention.package import PackageBackend, joined

if TYPE_CHECKING:
    from engine.runner import Packed


class XFormers(PackageBackend):
    name = "xformers"
    about = "xformers' fmha, split-K over pages for decoding; reads shared KV once for each sequence"
    module = "xformers.ops"
    page = 64  # keys of one step of its loop, which do not cross pages
    head_dims, takes = (16, 32, 64, 128, 256), "16, 32, 64, 128, 256"

    def step(self, packed: Packed) -> XFormersStep:
        return XFormersStep(self, packed)


class XFormersStep(StepAttention):
    """Its pages hold tokens of all heads side by side, ours the tokens of one head; so each KV head of a decoding row
    goes in as a sequence of its own, with a table of pages `block * Hk + head`, and the cache is read where it lies.
    """

    def __init__(self, backend: XFormers, packed: Packed):
        super().__init__(backend.kv, backend.tensor(packed.slots), backend.writes(packed))
        self.fmha, self.scale, self.target = backend.package.fmha, backend.scale, backend.target
        self.decoding = single = leading_single(packed)
        heads, size = self.target.num_kv_heads, self.target.block_size
        lengths, bias = packed.context_lens.tolist(), self.fmha.attn_bias
        device = {"device": self.target.device}
        if single:
            tables = packed.tables[:single] * heads + np.arange(heads, dtype=np.int32)[:, None, None]
            self.paged = bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
                q_seqlen=[1] * (heads * single),
                kv_seqlen=lengths[:single] * heads,
                block_tables=backend.tensor(tables.reshape(heads * single, -1)),
                page_size=size,
                **device,
            )
        counts = np.diff(packed.cu_seqlens)[single:].tolist()
        if counts:
            self.causal = bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
                q_seqlen=counts, kv_seqlen=lengths[single:], **device
            )
            self.cells = backend.tensor(_cells(packed.tables[single:], lengths[single:], size))
        self.chunked = bool(counts)

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        n, attention = self.decoding, self.fmha.memory_efficient_attention_forward
        heads, group, dim = self.target.num_kv_heads, self.target.group, self.target.head_dim
        parts = []
        if n:
            queries = q[:n].view(n, heads, group, dim).transpose(0, 1).reshape(1, heads * n, 1, group, dim)
            keys, values = (
                cache.reshape(1, -1, 1, 1, dim).expand(-1, -1, -1, group, -1) for cache in (k_cache, v_cache)
            )
            op = self.fmha.triton_splitk.FwOp
            decoded = attention(queries, keys, values, attn_bias=self.paged, scale=self.scale, op=op)
            parts.append(decoded.view(heads, n, group, dim).transpose(0, 1).reshape(n, heads * group, dim))
        if self.chunked:
            block, offset = self.cells
            keys, values = (
                cache[block, :, offset][None, :, :, None].expand(-1, -1, -1, group, -1) for cache in (k_cache, v_cache)
            )
            queries = q[n:].view(1, -1, heads, group, dim)
            attended = attention(queries, keys, values, attn_bias=self.causal, scale=self.scale)
            parts.append(attended.reshape(-1, heads * group, dim))
        return joined(parts)


def _cells(tables: np.ndarray, lengths: list[int], block_size: int) -> np.ndarray:
    """Block and offset of every token of some sequences, one behind the other: [2, sum of lengths] int64."""
    index = [np.divmod(np.arange(length), block_size) for length in lengths]
    block = np.concatenate([table[at] for table, (at, _) in zip(tables, index, strict=True)])
    return np.stack([block.astype(np.int64), np.concatenate([offset for _, offset in index])])

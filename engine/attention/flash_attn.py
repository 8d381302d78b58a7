"""The flash-attn package: decoding rows by flash_attn_with_kvcache, chunks by flash_attn_varlen_func, both paged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from engine.attention.backend import StepAttention, leading_single
from engine.attention.package import PackageBackend, joined

if TYPE_CHECKING:
    from engine.runner import Packed


class FlashAttention(PackageBackend):
    name = "flash_attn"
    about = "the flash-attn package, paged; reads shared KV once for each sequence"
    module = "flash_attn"
    page = 256  # flash-attn 2 reads pages of this size and its multiples
    head_dims, takes = range(8, 257, 8), "multiples of 8 up to 256"

    def step(self, packed: Packed) -> FlashStep:
        return FlashStep(self, packed)


class FlashStep(StepAttention):
    """Caches are handed over as [blocks, block_size, Hk, D], a view: flash-attn reads their strides."""

    def __init__(self, backend: FlashAttention, packed: Packed):
        super().__init__(backend.kv, backend.tensor(packed.slots), backend.writes(packed))
        self.package, self.scale = backend.package, backend.scale
        self.decoding = single = leading_single(packed)
        self.tables = backend.tensor(packed.tables)
        self.lengths = backend.tensor(packed.context_lens)
        counts, lengths = np.diff(packed.cu_seqlens)[single:], packed.context_lens[single:]
        self.chunks: dict[str, Any] | None = None
        if len(counts):
            self.chunks = {
                "cu_seqlens_q": backend.tensor(_cumulated(counts)),
                "cu_seqlens_k": backend.tensor(_cumulated(lengths)),
                "max_seqlen_q": int(counts.max()),
                "max_seqlen_k": int(lengths.max()),
                "block_table": self.tables[single:],
            }

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        keys, values, n = k_cache.transpose(1, 2), v_cache.transpose(1, 2), self.decoding
        same: dict[str, Any] = {"softmax_scale": self.scale, "causal": True}
        parts = []
        if n:
            decoded = self.package.flash_attn_with_kvcache(
                q[:n, None], keys, values, cache_seqlens=self.lengths[:n], block_table=self.tables[:n], **same
            )
            parts.append(decoded[:, 0])
        if self.chunks is not None:
            parts.append(self.package.flash_attn_varlen_func(q[n:], keys, values, **self.chunks, **same))
        return joined(parts)


def _cumulated(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

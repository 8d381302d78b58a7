"""The flash-attn package: decoding rows by flash_attn_with_kvcache, chunks by flash_attn_varlen_func, both paged."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engine.attention.backend import Backend, StepAttention, Target, leading_single
from engine.memory import KVCache

if TYPE_CHECKING:
    from engine.runner import Packed

PAGE = 256  # tokens: flash-attn 2 reads pages of this size and its multiples


class FlashAttention(Backend):
    name = "flash_attn"
    about = "the flash-attn package, paged; reads shared KV once for each sequence"

    def __init__(self, kv: KVCache, target: Target, share_prefixes: bool):
        super().__init__(kv, target, share_prefixes)
        self.package: Any = import_module("flash_attn")

    @classmethod
    def why_not(cls, target: Target) -> str | None:
        if find_spec("flash_attn") is None:
            return "the flash-attn package is not installed; pip install 'axpo[flash-attn]'"
        return why_not_cuda_half(target) or (
            f"block_size is {target.block_size}, and its pages are multiples of {PAGE} tokens; give block_size={PAGE}"
            if target.block_size % PAGE
            else f"head_dim is {target.head_dim}, and it takes multiples of 8 up to 256; use 'ours' or 'sdpa'"
            if target.head_dim % 8 or target.head_dim > 256
            else None
        )

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
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def why_not_cuda_half(target: Target) -> str | None:
    """What flash-attn and xformers both need."""
    if target.device.type != "cuda":
        return f"it runs on CUDA, and the engine is on the {target.device.type.upper()}; use 'ours' or 'sdpa'"
    if target.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {target.dtype}, and it takes bf16 and fp16; give dtype=torch.bfloat16"
    if torch.cuda.get_device_capability(target.device) < (8, 0):
        return "the GPU is older than compute capability 8.0; use 'ours' or 'sdpa'"
    return None


def _cumulated(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

"""torch's scaled_dot_product_attention, sequence by sequence: runs on every device, and is what others are held to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.backend import Backend, StepAttention, Target

if TYPE_CHECKING:
    from engine.runner import Packed


class SDPA(Backend):
    name = "sdpa"
    about = "torch's scaled_dot_product_attention, a gather and a call a sequence: the reference, on every device"

    @classmethod
    def why_not(cls, target: Target) -> str | None:
        return None

    def step(self, packed: Packed) -> SDPAStep:
        return SDPAStep(self, packed)


class SDPAStep(StepAttention):
    def __init__(self, backend: SDPA, packed: Packed):
        super().__init__(backend.kv, backend.tensor(packed.slots), backend.writes(packed))
        self.scale = backend.scale
        size, device = backend.target.block_size, backend.target.device
        starts, lengths = packed.cu_seqlens.tolist(), packed.context_lens.tolist()
        self.sequences: list[tuple[slice, int, Tensor, Tensor | None]] = []
        for s, length in enumerate(lengths):
            count = starts[s + 1] - starts[s]
            blocks = backend.tensor(packed.tables[s, : -(-length // size)].astype("int64"))
            mask = None  # a single query sees everything
            if count > 1:
                mask = torch.ones(count, length, dtype=torch.bool, device=device).tril(length - count)
            self.sequences.append((slice(starts[s], starts[s + 1]), length, blocks, mask))

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for rows, length, blocks, mask in self.sequences:
            keys, values = (
                cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :length] for cache in (k_cache, v_cache)
            )  # [1, Hk, length, D]
            queries = q[rows].transpose(0, 1)[None]
            attended = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=self.scale, enable_gqa=True
            )
            out[rows] = attended[0].transpose(0, 1)
        return out

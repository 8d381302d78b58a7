"""What an attention backend is: chosen once for an engine, it makes one object a step, which every layer calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from engine.memory import KVCache
from kernels import write_kv

if TYPE_CHECKING:
    from engine.runner import Packed


@dataclass(frozen=True, slots=True)
class Target:
    """What a backend would have to serve."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads


class Backend(ABC):
    """An attention over the paged cache. `name` is what `LLM(attention=…)` calls it; `about` says what it is."""

    name: ClassVar[str]
    about: ClassVar[str]

    def __init__(self, kv: KVCache, target: Target, share_prefixes: bool):
        self.kv = kv
        self.target = target
        self.share_prefixes = share_prefixes
        self.scale = target.head_dim**-0.5

    @classmethod
    @abstractmethod
    def why_not(cls, target: Target) -> str | None:
        """Why it cannot serve, with what would help; None when it can. Looks, and loads nothing."""

    @abstractmethod
    def step(self, packed: Packed) -> StepAttention:
        """The attention of one step."""

    def tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.target.device)

    def writes(self, packed: Packed) -> Tensor | None:
        return None if packed.writes is None else self.tensor(packed.writes)


class StepAttention(ABC):
    """Attention of one step, for `Qwen3VL.forward`: stores new keys and values, then attends to all of them.

    slots [W] int64: where new K and V go, block * block_size + offset; writes: the W packed rows that are new, or None
    when all are (a fork's first query re-reads a token whose KV it shares).
    """

    def __init__(self, kv: KVCache, slots: Tensor, writes: Tensor | None):
        self.kv = kv
        self.slots = slots
        self.writes = writes

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_cache, v_cache = self.kv.layer(layer)
        if self.writes is not None:
            k, v = k[self.writes], v[self.writes]
        write_kv(k, v, k_cache, v_cache, self.slots)
        return self.attend(q, k_cache, v_cache)

    @abstractmethod
    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """q [T, Hq, D], caches [blocks, Hk, block_size, D] -> [T, Hq, D]."""


def leading_single(packed: Packed) -> int:
    """How many sequences at the front of the batch have exactly one query: the decoding ones."""
    longer = np.flatnonzero(np.diff(packed.cu_seqlens) != 1)
    return int(longer[0]) if len(longer) else len(packed.cu_seqlens) - 1

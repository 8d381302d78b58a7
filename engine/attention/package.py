"""What backends that call an installed package share: when it can serve, and where it comes from."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine.attention.backend import Backend, Target
from engine.memory import KVCache


class PackageBackend(Backend):
    """Attention by the package `name`, whose `module` is imported once the backend is taken.

    page: blocks have to be multiples of so many tokens. head_dims: the widths of a head that it takes; takes: in words.
    """

    module: ClassVar[str]
    page: ClassVar[int]
    head_dims: ClassVar[tuple[int, ...] | range]
    takes: ClassVar[str]

    def __init__(self, kv: KVCache, target: Target, share_prefixes: bool):
        super().__init__(kv, target, share_prefixes)
        self.package: Any = import_module(self.module)

    @classmethod
    def why_not(cls, target: Target) -> str | None:
        if find_spec(cls.name) is None:
            package = cls.name.replace("_", "-")
            return f"the {package} package is not installed; pip install 'axpo[{package}]'"
        if target.device.type != "cuda":
            return f"it runs on CUDA, and the engine is on the {target.device.type.upper()}; use 'ours' or 'sdpa'"
        if target.dtype not in (torch.bfloat16, torch.float16):
            return f"dtype is {target.dtype}, and it takes bf16 and fp16; give dtype=torch.bfloat16"
        if torch.cuda.get_device_capability(target.device) < (8, 0):
            return "the GPU is older than compute capability 8.0; use 'ours' or 'sdpa'"
        if target.block_size % cls.page:
            multiples = f"its pages are multiples of {cls.page} tokens; give block_size={cls.page}"
            return f"block_size is {target.block_size}, and {multiples}"
        if target.head_dim not in cls.head_dims:
            return f"head_dim is {target.head_dim}, and it takes {cls.takes}; use 'ours' or 'sdpa'"
        return None


def joined(parts: list[Tensor]) -> Tensor:
    """What decoding rows and chunks gave, one behind the other; either may be missing."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)

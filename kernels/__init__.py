"""Operations of the engine and the trainer: each a plain-torch reference beside its compiled form."""

from kernels.kv_cache import copy_blocks, write_kv
from kernels.paged_attention import paged_attention
from kernels.tree_attention import tree_attention

__all__ = [
    "copy_blocks",
    "paged_attention",
    "tree_attention",
    "write_kv",
]

"""The KV cache: one tensor for all layers, given back by sleep and taken again by wake."""

import math
import mmap

import torch
from torch import Tensor

from engine.block_pool import BlockCopy
from engine.models.config import TextConfig
from kernels import copy_blocks


class KVCache:
    """[layers, 2 (K, V), blocks, kv_heads, block_size, head_dim] in the compute dtype.

    A head's tokens are contiguous inside a block, so that attention reads rows of `block_size * head_dim` values.
    whole_blocks: a block's tokens do not lie one behind the other (kernels.packed), so it is copied as a whole.
    """

    def __init__(self, config: TextConfig, num_bytes: int, block_size: int, dtype: torch.dtype, device: torch.device):
        self._per_block = (config.num_kv_heads, block_size, config.head_dim)
        self._layers = config.num_layers
        self._dtype, self._device = dtype, device
        self.bytes_per_block = 2 * self._layers * math.prod(self._per_block) * dtype.itemsize
        self.num_blocks = num_bytes // self.bytes_per_block
        self.blocks_copied = 0
        self.tokens_copied = 0
        self.whole_blocks = False
        if self.num_blocks < 2:
            raise ValueError(
                f"kv_cache_bytes is {num_bytes}; this model needs {self.bytes_per_block} bytes a block of {block_size} "
                "tokens, and at least two blocks"
            )
        self._data: Tensor | None = None
        self._pages: mmap.mmap | None = None
        self.wake()

    @property
    def data(self) -> Tensor:
        if self._data is None:
            raise RuntimeError("the engine is asleep; call wake_up() first")
        return self._data

    @property
    def nbytes(self) -> int:
        return 0 if self._data is None else self._data.nbytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, each [blocks, kv_heads, block_size, head_dim]."""
        return self.data[index, 0], self.data[index, 1]

    def copy(self, copies: list[BlockCopy]) -> None:
        """Runs copy-on-write for all layers in one call; only valid tokens move, unless blocks are kept whole."""
        columns = zip(*((copy.src, copy.dst, copy.valid) for copy in copies), strict=True)
        src, dst, valid = (torch.tensor(column, dtype=torch.int64, device=self._device) for column in columns)
        if self.whole_blocks:
            valid = torch.full_like(valid, self._per_block[1])
        copy_blocks(self.data, src, dst, valid)
        self.blocks_copied += len(copies)
        self.tokens_copied += sum(copy.valid for copy in copies)

    def sleep(self) -> None:
        """Gives the memory back. On the CPU the addresses stay reserved, and the next `wake` uses them again."""
        self._data = None
        if self._pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)

    def wake(self) -> None:
        if self._data is not None:
            return
        shape = (self._layers, 2, self.num_blocks, *self._per_block)
        if self._device.type != "cpu":
            self._data = torch.empty(shape, dtype=self._dtype, device=self._device)
            return
        if self._pages is None:  # pages become real when they are first written
            self._pages = mmap.mmap(-1, self.num_blocks * self.bytes_per_block)
        self._data = torch.frombuffer(self._pages, dtype=self._dtype).view(shape)

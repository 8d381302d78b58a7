"""The KV cache: one tensor for all layers, given back by sleep and taken again by wake."""

import math
import resource
from numbers import Integral

import torch
from torch import Tensor

from engine.arena import available_bytes, make_arena, view
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
                f"the KV cache is to have {num_bytes} bytes; this model needs {self.bytes_per_block} bytes a block of "
                f"{block_size} tokens, and at least two blocks; raise kv_cache_bytes or kv_cache_fraction"
            )
        self._arena = make_arena(self.num_blocks * self.bytes_per_block, device)
        self._data: Tensor | None = None
        self.wake()

    @property
    def data(self) -> Tensor:
        self.check()
        assert self._data is not None
        return self._data

    def check(self) -> None:
        """Raises RuntimeError while asleep."""
        if self._data is None:
            raise RuntimeError("the engine is asleep; call wake_up() first")

    @property
    def nbytes(self) -> int:
        return 0 if self._data is None else self._data.nbytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, each [blocks, kv_heads, block_size, head_dim]."""
        return self.data[index, 0], self.data[index, 1]

    def copy(self, copies: list[BlockCopy]) -> None:
        """Runs copy-on-write for all layers in one call; only valid tokens move, unless blocks are kept whole."""
        columns = torch.tensor([(copy.src, copy.dst, copy.valid) for copy in copies], dtype=torch.int64).T.contiguous()
        if self._device.type == "cuda":  # so that the host need not wait for a step that runs
            columns = columns.pin_memory()
        src, dst, valid = columns.to(self._device, non_blocking=True)
        if self.whole_blocks:
            valid = torch.full_like(valid, self._per_block[1])
        copy_blocks(self.data, src, dst, valid)
        self.blocks_copied += len(copies)
        self.tokens_copied += len(copies) * self._per_block[1] if self.whole_blocks else sum(c.valid for c in copies)

    def sleep(self) -> None:
        """Gives the memory back. The addresses stay reserved, and the next `wake` uses them again."""
        if self._data is not None:
            self._data = None
            self._arena.release()

    def wake(self) -> None:
        if self._data is None:
            self._arena.restore()
            shape = (self._layers, 2, self.num_blocks, *self._per_block)
            self._data = view(self._arena.bytes(), 0, shape, self._dtype)


DEFAULT_BYTES = 1 << 29


def check_kv_size(num_bytes: int | None, fraction: float | None) -> None:
    """Raises ValueError for both a size and a fraction, and for a fraction outside (0, 1]."""
    if num_bytes is not None and fraction is not None:
        raise ValueError(f"kv_cache_bytes={num_bytes} and kv_cache_fraction={fraction}: give one of them")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"kv_cache_fraction={fraction} must be above 0 and at most 1")


def check_counts(**options: int) -> None:
    """Raises ValueError for one that is no whole number above 0."""
    for name, value in options.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value} must be a whole number, at least 1")


def kv_size(num_bytes: int | None, fraction: float | None, device: torch.device) -> int:
    """Bytes of the KV cache: as given, or a part of what is free now, or half a gigabyte."""
    if fraction is not None:
        return int(available_bytes(device) * fraction)
    return DEFAULT_BYTES if num_bytes is None else int(num_bytes)


def peak_bytes(device: torch.device, in_arenas: int) -> int:
    """The most memory that was held: of the process on the CPU; on a GPU torch's peak and `in_arenas`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + in_arenas
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

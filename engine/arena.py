"""Memory that can be given back and taken again at the same addresses, so that tensors and CUDA graphs stay valid."""

import mmap
from abc import ABC, abstractmethod
from math import prod
from pathlib import Path

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes: what a tensor in an arena begins at, as in torch's own allocator on a GPU

CGROUP = tuple(  # (limit, use) of a container, versions 2 and 1
    (Path("/sys/fs/cgroup") / limit, Path("/sys/fs/cgroup") / used)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    )
)


class Arena(ABC):
    """`num_bytes` at addresses that do not change. What it held is lost between `release` and `restore`.

    Tensors made by `tensor` stay valid over both; while released they must not be touched on a GPU.
    """

    def __init__(self, num_bytes: int, device: torch.device):
        self.num_bytes = num_bytes
        self.device = device
        self.held = False

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self.num_bytes if self.held else 0

    @abstractmethod
    def bytes(self) -> Tensor:
        """All of it, [num_bytes] uint8. The tensor keeps the arena alive."""

    @abstractmethod
    def release(self) -> None: ...

    @abstractmethod
    def restore(self) -> None: ...


class HostArena(Arena):
    """Anonymous private pages, which become real when they are first written. Restored, they read as zeros."""

    def __init__(self, num_bytes: int, device: torch.device):
        super().__init__(num_bytes, device)
        # Private: of shared anonymous pages MADV_DONTNEED frees nothing.
        self._pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.held = True

    def bytes(self) -> Tensor:
        return torch.frombuffer(self._pages, dtype=torch.uint8)

    def release(self) -> None:
        self._pages.madvise(mmap.MADV_DONTNEED)
        self.held = False

    def restore(self) -> None:
        self.held = True


def make_arena(num_bytes: int, device: torch.device) -> Arena:
    """Raises ValueError for a device that is neither the CPU nor CUDA, RuntimeError when there is too little memory."""
    if device.type == "cpu":
        return HostArena(num_bytes, device)
    if device.type != "cuda":
        raise ValueError(f"device {device}: the engine runs on 'cpu' and 'cuda'")
    from engine.cuda_arena import CUDAArena

    return CUDAArena(num_bytes, device)


def view(flat: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor over the bytes of `flat` ([n] uint8) from `offset` on."""
    return flat[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)


def available_bytes(device: torch.device) -> int:
    """Free memory of a GPU, what torch has cached included; of the host what a process can still get.

    Raises:
        RuntimeError: this system does not say.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        raise RuntimeError("kv_cache_fraction: this system does not say what memory is free; give kv_cache_bytes")
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = [int(lines["MemAvailable"].split()[0]) << 10]
    for limit, used in CGROUP:
        if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
            free.append(int(most) - int(used.read_text()))
    return max(min(free), 0)

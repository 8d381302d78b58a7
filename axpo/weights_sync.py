"""Brings the trained weights to the engine's resident model in the same process."""

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from axpo.distributed import world_size


@dataclass(frozen=True, slots=True)
class SyncResult:
    """bytes: what this rank copied, 0 where the engine reads the trainer's own storage.

    peak_bytes: device memory that the sync took on top; without an allocator that counts, what the largest layer takes.
    """

    bytes: int
    seconds: float
    aliased: bool
    peak_bytes: int

    def metrics(self) -> dict[str, float | None]:
        return {
            "weights/bytes": float(self.bytes),
            "weights/sync_s": self.seconds,
            "weights/peak_bytes": float(self.peak_bytes),
        }


def push_weights(trainer: nn.Module, engine: nn.Module, alias: bool = True) -> SyncResult:
    """Makes the engine's parameters equal the trainer's, cast to the engine's dtype; every rank calls it.

    With `alias`, one rank and equal dtypes the engine's parameters become views of the trainer's storage, so that an
    optimizer step is seen without a copy; later calls only check that this still holds. Otherwise one layer at a time
    is gathered, copied into the engine's own storage, whose addresses stay, and released. The caller tells the engine
    (`llm.weights_updated()`), whose caches are keyed by the version of the weights.

    Raises:
        ValueError: the two models have different parameters.
    """
    start = time.perf_counter()
    source, target = dict(trainer.named_parameters()), dict(engine.named_parameters())
    if source.keys() != target.keys():
        raise ValueError(f"trainer and engine differ in parameters {sorted(source.keys() ^ target.keys())[:3]}")
    alias = (
        alias
        and world_size() == 1
        and all(
            parameter.dtype == target[name].dtype and parameter.device == target[name].device
            for name, parameter in source.items()
        )
    )
    if alias:
        for name, parameter in source.items():
            local = _local(parameter)
            if target[name].data_ptr() != local.data_ptr():
                target[name].data = local
        return SyncResult(0, time.perf_counter() - start, aliased=True, peak_bytes=0)
    device = next(iter(target.values())).device
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device) if on_cuda else 0
    copied, largest = _copy_by_layer(trainer, target)
    if on_cuda:
        torch.cuda.synchronize(device)
        largest = torch.cuda.max_memory_allocated(device) - held
    return SyncResult(copied, time.perf_counter() - start, aliased=False, peak_bytes=largest)


@torch.no_grad()
def _copy_by_layer(trainer: nn.Module, target: dict[str, nn.Parameter]) -> tuple[int, int]:
    """Gathers one FSDP group after another, in the module order, which is the same on every rank.

    Returns the bytes that were copied, and those of the largest group as it was gathered.
    """
    groups = {name: module for name, module in trainer.named_modules() if isinstance(module, FSDPModule)}
    owned = _own_parameters(list(target), list(groups))
    copied = largest = 0
    for prefix, module in groups.items():
        module.unshard()
        gathered = 0
        for name in owned[prefix]:
            full = trainer.get_parameter(name)
            target[name].copy_(full)
            copied += target[name].nbytes
            gathered += full.nbytes
        module.reshard()
        largest = max(largest, gathered)
    return copied, largest


def _own_parameters(names: list[str], groups: list[str]) -> dict[str, list[str]]:
    """Which parameters an FSDP group gathers: those below it, but not below a group inside it."""
    owned: dict[str, list[str]] = {group: [] for group in groups}
    for name in names:
        parts = name.split(".")
        below = (".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1))
        owned[next(prefix for prefix in below if prefix in owned)].append(name)
    return owned


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()

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
    """bytes: what this rank copied, 0 where the engine reads the trainer's own storage."""

    bytes: int
    seconds: float
    aliased: bool


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
        copied = 0
    else:
        copied = _copy_by_layer(trainer, target)
    return SyncResult(copied, time.perf_counter() - start, alias)


@torch.no_grad()
def _copy_by_layer(trainer: nn.Module, target: dict[str, nn.Parameter]) -> int:
    """Gathers one FSDP group after another, in the module order, which is the same on every rank."""
    groups = {name: module for name, module in trainer.named_modules() if isinstance(module, FSDPModule)}
    copied = 0
    for prefix, module in groups.items():
        module.unshard()
        for name in _own_parameters(prefix, list(target), list(groups)):
            target[name].copy_(trainer.get_parameter(name))
            copied += target[name].numel() * target[name].element_size()
        module.reshard()
    return copied


def _own_parameters(prefix: str, names: list[str], groups: list[str]) -> list[str]:
    """The parameters that this FSDP group gathers: those below it, but not below a group inside it."""

    def owner(name: str) -> str:
        return max((group for group in groups if not group or name.startswith(f"{group}.")), key=len)

    return [name for name in names if owner(name) == prefix]


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()

"""Refuses a run that these devices cannot hold, before anything is loaded."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from axpo.config import Config, SftConfig
from axpo.distributed import world_size
from axpo.plan import make_plan
from axpo.plan.devices import GIB, Device, host_memory

TOLERANCE = 1.1  # an estimate may be this much too high


def check_devices() -> None:
    """Raises ValueError when torchrun started more ranks than there are GPUs, or GPUs cannot talk to each other."""
    if not torch.cuda.is_available():
        return
    problem = device_problem(
        ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        visible=torch.cuda.device_count(),
        nccl=dist.is_nccl_available(),
    )
    if problem:
        raise ValueError(problem)


def device_problem(ranks: int, visible: int, nccl: bool) -> str | None:
    """What is wrong with so many ranks on a node of `visible` GPUs, or None."""
    if ranks > visible:
        return (
            f"torchrun --nproc-per-node {ranks}: this node shows {visible} GPUs (CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); start {visible} ranks, or make more of them visible"
        )
    if not nccl:
        return (
            f"torch {torch.__version__} was built without NCCL, which ranks on GPUs need; install a CUDA build of it, "
            "or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    return None


def check_fits(config: Config | SftConfig, device: torch.device) -> None:
    """Raises ValueError with what to change when `axpo.plan` counts more memory than this rank's device has."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    plan = make_plan(config, _device(device, local), world_size(), max(1, world_size() // local))
    used = plan.memory
    if used.needed <= TOLERANCE * used.available:
        return
    said = plan.warnings[0]
    if device.type == "cpu":
        said += (
            f". No GPU is in use: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices. For a model "
            "of this size run on GPUs with a CUDA build of torch, as in docs/launch.md"
        )
    raise ValueError(f"model.path = {config.model.path!r} {said}. `python -m axpo.plan` shows what takes the memory")


def _device(device: torch.device, local: int) -> Device:
    """Only its memory matters here; what other processes hold of a GPU is not available."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return _of_memory(torch.cuda.get_device_name(device), free, GIB)
    return _of_memory("cpu", host_memory() / local, GIB / 2)


def _of_memory(name: str, memory: float, context: float) -> Device:
    rate = 1e12
    return Device(name, rate, memory, rate, rate, rate, rate, context=context)

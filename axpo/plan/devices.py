"""What a device can do at most, by its published data sheet; `cpu` is measured on this machine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

GB, GIB = 1e9, 2.0**30


@dataclass(frozen=True, slots=True)
class Device:
    """flops: dense bf16 with fp32 accumulation, a second. memory: bytes that a process can have. bandwidth: of the
    memory, bytes a second. link, network: bytes a second that one rank receives from its node, and from other nodes.
    host_link: from the host's memory. The efficiencies are shares of those peaks. step_s, token_s: seconds of an engine
    step, and of each token that it samples, beside the roofline. context: bytes that CUDA and its libraries take."""

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    host_link: float
    train_efficiency: float = 0.45
    prefill_efficiency: float = 0.50
    bandwidth_efficiency: float = 0.70
    link_efficiency: float = 0.75
    step_s: float = 1.5e-3
    token_s: float = 2e-6
    context: float = 1.5 * GIB


def _gpu(
    name: str, tflops: float, gigabytes: float, tb_per_s: float, link: float, network: float, host_link: float
) -> Device:
    """gigabytes: as nvidia-smi or rocm-smi shows them, in GiB; links in GB/s and direction."""
    return Device(name, tflops * 1e12, gigabytes * GIB, tb_per_s * 1e12, link * GB, network * GB, host_link * GB)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40", 312, 39.4, 1.555, 300, 25, 25),
        _gpu("a100-80", 312, 79.2, 2.039, 300, 25, 25),
        _gpu("h100", 989, 79.1, 3.35, 450, 50, 55),
        _gpu("h200", 989, 139.8, 4.8, 450, 50, 55),
        _gpu("b200", 2250, 178.0, 7.7, 900, 50, 55),
        _gpu("l40s", 362, 44.4, 0.864, 25, 12.5, 25),
        _gpu("4090", 165, 23.6, 1.008, 12.5, 3, 25),
        _gpu("mi300x", 1307, 191.5, 5.3, 448, 50, 55),
    )
}
NAMES = (*GPUS, "cpu")


def find_device(name: str, ranks: int = 1) -> Device:
    """By name; `cpu` measures this machine, whose cores and memory the ranks share. ValueError for another name."""
    if name == "cpu":
        return _this_cpu(ranks)
    if name not in GPUS:
        raise ValueError(f"--gpu {name}: unknown; the table has {', '.join(NAMES)}")
    return GPUS[name]


def named_like(device_name: str, memory: float) -> Device | None:
    """The table's entry of a device as torch.cuda.get_device_name calls it, such as 'NVIDIA H100 80GB HBM3'."""
    words = device_name.lower().replace("-", " ").split()
    found = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in words]
    return min(found, key=lambda gpu: abs(gpu.memory - memory)) if found else None


def host_memory() -> float:
    """Bytes of main memory that this process may use: the machine's, or its control group's limit if that is less."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, float(Path(file).read_text()))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return total


def matmul_flops(n: int = 512, repeats: int = 40) -> float:
    """Operations a second of this process's fp32 matrix products of n³ on the CPU, which milliseconds show.

    The best of many short ones: what the machine can do when other work leaves it alone.
    """
    import torch

    a, b = torch.ones(n, n), torch.ones(n, n)
    return 2.0 * n**3 / min(_seconds(lambda: a @ b) for _ in range(repeats))


def _this_cpu(ranks: int) -> Device:
    """The efficiencies are those of small matrices between Python calls, as in the mini model (docs/plan.md)."""
    import torch

    source = torch.zeros(1 << 24)
    target = torch.empty_like(source)
    copy = min(_seconds(lambda: target.copy_(source)) for _ in range(10))
    rate = 2 * source.nbytes / copy
    return Device(
        name="cpu",
        flops=matmul_flops() / ranks,
        memory=host_memory() / ranks,
        bandwidth=rate / ranks,
        link=rate / 4,
        network=rate / 4,
        host_link=rate,
        train_efficiency=0.35,
        prefill_efficiency=0.45,
        bandwidth_efficiency=0.7,
        step_s=1e-3,
        token_s=10e-6,
        context=0.5 * GIB,
    )


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

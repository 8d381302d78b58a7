"""What a step cost on all ranks: use of the device, peaks of memory and KV cache, and which rank was late where."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from axpo.distributed import gather_objects, world_size
from axpo.plan.devices import matmul_flops, named_like
from engine import LLM


@dataclass(frozen=True, slots=True)
class RankReport:
    """What one rank tells of a step. seconds: `perf/<phase>_s`. cpu: seconds of processors. peak_memory: bytes.
    peak_blocks, preemptions: of its engine's KV cache."""

    seconds: dict[str, float]
    cpu: float
    peak_memory: int
    peak_blocks: int
    preemptions: int


class Telemetry:
    """Metrics of every step beyond its seconds; all ranks make the same calls.

    llm: the engine whose KV cache is watched, if the run has one.
    """

    def __init__(self, device: torch.device, llm: LLM | None = None):
        self._device, self._llm = device, llm
        self._peak = peak_flops(device)
        self._preemptions, self._cpu = 0, time.process_time()

    def metrics(self, seconds: Mapping[str, float], flops: float) -> dict[str, float | None]:
        """seconds: this rank's, of `Spans.metrics`. flops: of the update over all ranks, as `Learner.flops` counts."""
        now = time.process_time()
        report = RankReport(dict(seconds), now - self._cpu, self._peak_memory(), *self._kv())
        self._cpu = now
        metrics = step_metrics(gather_objects([report]), flops, self._peak)
        if self._llm is not None:
            metrics["perf/kv_peak_fraction"] = (metrics["perf/kv_peak_blocks"] or 0) / self._llm.pool.num_blocks
        return metrics

    def _peak_memory(self) -> int:
        """Bytes: of CUDA's allocator since the last call, or of the process since its start."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return peak
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def _kv(self) -> tuple[int, int]:
        if self._llm is None:
            return 0, 0
        stats = self._llm.stats()
        self._llm.pool.reset_peak()
        new = stats["preemptions"] - self._preemptions
        self._preemptions = stats["preemptions"]
        return stats["blocks_peak"], new


def step_metrics(reports: list[RankReport], flops: float, peak: float | None) -> dict[str, float | None]:
    """Of all ranks: MFU over the training phase, seconds of processors, the largest peaks, and how late ranks were.

    `perf/skew_<phase>` is the longest time of a rank over the median, `perf/slowest_<phase>` that rank; with one rank
    there is neither. peak: operations a second of a device; None leaves `perf/mfu` empty.
    """
    first = reports[0].seconds
    train = first.get("perf/train_s", 0.0)
    metrics: dict[str, float | None] = {
        "perf/mfu": flops / len(reports) / train / peak if train and peak else None,
        "perf/cpu_s": sum(report.cpu for report in reports),
        "perf/peak_memory_bytes": max(report.peak_memory for report in reports),
        "perf/kv_peak_blocks": max(report.peak_blocks for report in reports),
        "perf/kv_preemptions": sum(report.preemptions for report in reports),
    }
    if len(reports) == 1:
        return metrics
    for name in first:
        phase = name.removeprefix("perf/").removesuffix("_s")
        times = [report.seconds[name] for report in reports]
        middle = statistics.median(times)
        metrics[f"perf/skew_{phase}"] = max(times) / middle if middle else None
        metrics[f"perf/slowest_{phase}"] = times.index(max(times))
    return metrics


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that `device` can do at most: bf16, by the table of `axpo.plan`; None for a GPU outside it.

    On the CPU it is measured, in fp32, as matrix products of this process; ranks share the cores, and so the peak.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known = named_like(properties.name, properties.total_memory)
        return known.flops if known else None
    return matmul_flops() / world_size()

"""A step's report over ranks, the KV cache's peak, sinks that are missing, and devices that cannot do it."""

import random
from pathlib import Path

import pytest
import torch

from axpo.cli import resolve
from axpo.config import Config, Log, SftConfig
from axpo.fit import check_fits, device_problem
from axpo.metrics import Spans, check_sinks
from axpo.paths import model_directory
from axpo.telemetry import RankReport, Telemetry, peak_flops, step_metrics
from engine import LLM, SamplingParams
from tests.axpo.learner_worker import build_learner


def report(rollout: float, train: float, memory: int = 0, blocks: int = 0, preemptions: int = 0) -> RankReport:
    return RankReport({"perf/rollout_s": rollout, "perf/train_s": train}, 0.5, memory, blocks, preemptions)


def test_the_slowest_rank_of_every_phase_is_named():
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    late = rng.randrange(4)
    reports = [
        report(30.0 if rank == late else 10.0, 5.0, memory=rank, blocks=7 - rank, preemptions=1) for rank in range(4)
    ]
    metrics = step_metrics(reports, flops=8e12, peak=1e12)
    assert metrics["perf/slowest_rollout"] == late and metrics["perf/skew_rollout"] == 3.0, f"seed {seed}"
    assert metrics["perf/skew_train"] == 1.0
    assert metrics["perf/mfu"] == pytest.approx(8e12 / 4 / 5.0 / 1e12), "of one rank: a quarter of the operations"
    assert metrics["perf/peak_memory_bytes"] == 3 and metrics["perf/kv_peak_blocks"] == 7
    assert metrics["perf/kv_preemptions"] == 4 and metrics["perf/cpu_s"] == 2.0


def test_one_rank_has_no_slowest_and_an_unknown_device_no_mfu():
    metrics = step_metrics([report(1.0, 2.0)], flops=1e9, peak=None)
    assert metrics["perf/mfu"] is None
    assert not any("slowest" in name or "skew" in name for name in metrics)
    assert step_metrics([report(1.0, 0.0)], flops=1e9, peak=1e9)["perf/mfu"] is None


def test_the_peak_of_the_kv_cache_is_of_the_step():
    build_learner(model_directory("mini"))  # for its process group
    llm = LLM(model_directory("mini"), dtype=torch.float32, kv_cache_bytes=2**22)
    telemetry, spans = Telemetry(torch.device("cpu"), llm), Spans()

    def step(count: int) -> dict[str, float | None]:
        with spans("train"):
            sequences = [llm.open([1] * 40).fork()[0] for _ in range(count)]
            llm.run(sequences, SamplingParams(max_tokens=4, ignore_eos=True))
            held = llm.stats()["blocks_used"]
            for sequence in sequences:
                sequence.close()
        metrics = telemetry.metrics(spans.metrics(), flops=1e9)
        assert metrics["perf/kv_peak_blocks"] == held > 0
        assert metrics["perf/kv_peak_fraction"] == held / llm.pool.num_blocks
        return metrics

    many, few = step(6), step(1)
    assert many["perf/kv_peak_blocks"] > few["perf/kv_peak_blocks"], "the peak is forgotten when the step is over"  # type: ignore[operator]
    assert few["perf/peak_memory_bytes"] > 10 * 2**20  # type: ignore[operator]


def test_the_peak_of_this_cpu_is_what_a_product_reaches():
    peak = peak_flops(torch.device("cpu"))
    assert peak is not None and 1e8 < peak < 1e14


def test_a_sink_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_sinks(Log())
    (tmp_path / "wandb").mkdir()  # what wandb leaves behind is no installation
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"log\.wandb = true: wandb is not installed; pip install wandb"):
        check_sinks(Log(wandb=True))


def test_ranks_without_a_gpu_or_without_nccl(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert device_problem(ranks=2, visible=2, nccl=True) is None
    problem = device_problem(ranks=8, visible=2, nccl=True)
    assert (
        problem and "--nproc-per-node 8" in problem and "2 GPUs" in problem and "CUDA_VISIBLE_DEVICES is 0,1" in problem
    )
    problem = device_problem(ranks=2, visible=2, nccl=False)
    assert problem and "without NCCL" in problem and torch.__version__ in problem


@pytest.mark.parametrize(
    ("schema", "recipe", "size"), [(Config, "qwen3-vl-8b", "32b"), (SftConfig, "qwen3-vl-8b-sft", "32b")]
)
def test_a_model_that_this_machine_cannot_hold_is_refused(schema: type[Config], recipe: str, size: str):
    config = resolve(schema, [recipe, "--model.path", size, "--model.dtype", "float32"], recipe="mini")
    with pytest.raises(ValueError, match=r"model.path = '32b' does not fit: a rank needs [\d.]+ GiB") as error:
        check_fits(config, torch.device("cpu"))
    said = str(error.value)
    assert "No GPU is in use" in said and "docs/launch.md" in said and "python -m axpo.plan" in said


def test_what_fits_is_not_refused():
    check_fits(resolve(Config, ["mini"], recipe="mini"), torch.device("cpu"))

"""metrics.jsonl, TensorBoard events, the console line, and seconds by span."""

import io
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from axpo.metrics import MetricsLogger, Spans, table
from axpo.rundir import RunDir


def lines(run_dir: RunDir) -> list[dict]:
    return [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]


def test_one_flat_object_a_step_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    reward = rng.random()
    with MetricsLogger(run_dir, steps=2, tensorboard=False, console=False) as logger:
        logger.log(1, {"reward/mean": reward, "tool/calls": 3, "tool/accuracy": None, "a/nan": math.nan})
        first = {"step": 1, "reward/mean": reward, "tool/calls": 3, "tool/accuracy": None, "a/nan": None}
        assert lines(run_dir) == [first], f"seed {seed}"
        logger.log(2, {"a/int": np.int64(4), "a/float": np.float32(0.5), "a/tensor": torch.tensor(2.5), "a/bool": True})
    assert lines(run_dir) == [first, {"step": 2, "a/int": 4, "a/float": 0.5, "a/tensor": 2.5, "a/bool": 1}]


def test_what_is_not_a_metric_is_an_error_and_writes_nothing(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    with MetricsLogger(run_dir, steps=1, tensorboard=False, console=False) as logger:
        with pytest.raises(ValueError, match=r"'reward'.*no group.*group/reward"):
            logger.log(1, {"a/fine": 1, "reward": 1})
        with pytest.raises(ValueError, match=r"'a/list' = \[1, 2\]: not a number"):
            logger.log(1, {"a/fine": 1, "a/list": [1, 2]})  # type: ignore[dict-item]
    assert run_dir.metrics.read_text() == ""


def test_only_rank_0_writes(tmp_path: Path):
    with MetricsLogger(RunDir(tmp_path), steps=1, rank=1) as logger:
        logger.log(1, {"reward/mean": 1.0})
        logger.print("nothing")
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_appends(tmp_path: Path):
    for step in (1, 2):
        with MetricsLogger(RunDir(tmp_path, step - 1), steps=2, tensorboard=False, console=False) as logger:
            logger.log(step, {"a/b": step})
    assert [line["step"] for line in lines(RunDir(tmp_path))] == [1, 2]


def test_tensorboard_events_hold_the_same_numbers(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for checkpoint, value in ((0, 0.5), (1, 0.75)):  # step 2 is computed again by a resume from step 1
        with MetricsLogger(RunDir(tmp_path, checkpoint), steps=3, console=False) as logger:
            for step in range(checkpoint + 1, 4 - (checkpoint == 0)):
                logger.log(step, {"reward/mean": value, "tool/accuracy": None})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"], "what was not measured is not an event"
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.5), (2, 0.75), (3, 0.75)]


def test_without_a_terminal_a_step_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with MetricsLogger(RunDir(tmp_path), steps=40, tensorboard=False) as logger:
        logger.log(
            7, {"reward/mean": 0.4567, "tool/rate": 0.314, "tool/accuracy": None, "loss/kl": 3, "perf/step_s": 2}
        )
        logger.print(table("Held-out questions", ["", "Pass@1"], [["before", "0.41"]]))
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "step 7/40  reward 0.457  tool use 31%  right with tool –  s/step 2.0"
    assert "Pass@1" in out and "0.41" in out


def test_on_a_terminal_one_bar_shows_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr("axpo.metrics.Console", lambda **_: screen)
    with MetricsLogger(RunDir(tmp_path), steps=4, tensorboard=False) as logger:
        logger.log(3, {"reward/mean": 0.25})
        logger.print("evaluated")
    out = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "reward 0.250" in out and "3/4" in out and "evaluated" in out


def test_spans_add_up_to_the_step():
    spans = Spans()
    for _ in range(2):
        with spans("rollout"):
            time.sleep(0.02)
            with spans("tools"):
                time.sleep(0.03)
    time.sleep(0.02)
    metrics = spans.metrics()
    total = metrics.pop("perf/step_s")
    assert set(metrics) == {"perf/rollout_s", "perf/tools_s", "perf/unaccounted_s"}
    assert math.isclose(sum(metrics.values()), total, rel_tol=1e-9)
    assert metrics["perf/tools_s"] >= 0.06 and metrics["perf/unaccounted_s"] >= 0.02
    assert metrics["perf/rollout_s"] >= 0.04, "without the inner span's seconds"
    assert metrics["perf/rollout_s"] < total - metrics["perf/tools_s"]
    assert set(spans.metrics()) == {"perf/unaccounted_s", "perf/step_s"}, "each step starts anew"


def test_a_span_ends_when_its_work_raises():
    spans = Spans()
    with pytest.raises(KeyError), spans("train"):
        raise KeyError
    assert "perf/train_s" in spans.metrics()
    with spans("train"), pytest.raises(RuntimeError, match="inside a span"):
        spans.metrics()


def test_asynchronous_work_is_waited_for_at_both_ends():
    waits: list[int] = []
    spans = Spans(synchronize=lambda: waits.append(1))
    before = len(waits)
    with spans("train"):
        pass
    assert len(waits) == before + 2

"""Starts the real programs on a small real run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from axpo.trajectory import Trajectory

ROOT = Path(__file__).parents[2]
SMALL = {
    "rollout.questions_per_step": 8,
    "rollout.max_new_tokens": 96,
    "algo.group_size": 8,
    "algo.resamples_per_prefix": 4,
    "algo.budget_ratio": 0.25,
    "optim.lr": 1e-4,
    "eval.questions": 0,
    "checkpoint.every": 0,
    "log.trees_in_report": 2,
}


def axpo(
    module: str, *positional: str, ranks: int = 0, timeout: float = 300, **options: Any
) -> subprocess.CompletedProcess:
    """`python -m axpo.<module>`, or torchrun with `ranks`; options with `__` for the dot."""
    launcher = [sys.executable, "-m"]
    if ranks:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('__', '.')}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, f"axpo.{module}", *positional, *arguments]
    return subprocess.run(
        command, env=environment, cwd=ROOT, timeout=timeout, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def train(directory: Path, name: str, steps: int, *, ranks: int = 0, **options: Any) -> Path:
    """A small run that must succeed; returns its directory."""
    settings = {**{key.replace(".", "__"): value for key, value in SMALL.items()}, **options}
    done = axpo("train", ranks=ranks, run__dir=directory, run__name=name, run__steps=steps, **settings)
    assert done.returncode == 0, f"{name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return directory / name


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what a clock told: the group perf, and seconds (_s) of other groups."""
    return [{k: value for k, value in row.items() if not (k.startswith("perf/") or k.endswith("_s"))} for row in rows]


def trajectories(run: Path, step: int) -> list[Trajectory]:
    file = run / "trajectories" / f"step_{step:06d}.jsonl"
    return [Trajectory.from_json(line) for line in file.read_text().splitlines()]

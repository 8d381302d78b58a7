"""Trains a few updates on a fixed step, its questions dealt over the ranks; run by the tests under torchrun.

`python -m torch.distributed.run --nproc-per-node 2 tests/axpo/learner_worker.py CHECKPOINT OUT`
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch

from axpo.advantage import assign_credit
from axpo.checkpoint import Progress, export_policy, save_checkpoint
from axpo.config import Loss, Optim
from axpo.distributed import finish, gather_objects, initialise, rank, world_size
from axpo.learner import Learner
from axpo.packing import pack_trees
from axpo.trajectory import Trajectory
from axpo.tree import PackedBatch, build_trees
from axpo.weights_sync import push_weights
from engine.models import Qwen3VL
from tests.axpo.factory import IMAGE, random_group, random_resamples, text_only

BUDGET = 250
UPDATES = 3


def launch(worker: str, checkpoint: Path, out: Path) -> Path:
    """Runs a worker of this directory on two ranks and returns `out`, where it wrote."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(root / "tests/axpo" / worker), str(checkpoint), str(out)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def build_learner(path: Path, **changes: object) -> Learner:
    arguments = {
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "optim": Optim(lr=1e-2, weight_decay=0.1, warmup_steps=2),
        "total_steps": 10,
        "loss": Loss(kl_coef=0.1),
        "temperature": 0.9,
    }
    initialise(torch.device("cpu"))
    return Learner(path, **(arguments | changes))  # pyright: ignore[reportArgumentType]


def fixed_step(update: int) -> tuple[list[list[Trajectory]], dict[str, list[Trajectory]]]:
    """Update 0 and 1: three questions. Update 2: one, without an image, so that a second rank has no work at all."""
    rng = random.Random(update)
    groups = [text_only(random_group(rng, tool_rate=0.0))] if update == 2 else [random_group(rng, g) for g in range(3)]
    for group in groups:
        group[0].reward, group[1].reward = 1.0, 0.0
    resamples = {r.id: random_resamples(rng, r) for g in groups for r in g if r.used_tool and rng.random() < 0.5}
    for trajectory in [t for group in [*groups, *resamples.values()] for t in group]:
        trajectory.logprobs = [None if lp is None else -3.9 + 0.1 * lp for lp in trajectory.logprobs]
    assign_credit(groups, resamples)
    return groups, resamples


def batches(update: int) -> list[PackedBatch]:
    groups, resamples = fixed_step(update)
    mine = groups[rank() :: world_size()]
    return pack_trees([tree for group in mine for tree in build_trees(group, resamples, IMAGE)], BUDGET)


def main(checkpoint: Path, out: Path) -> None:
    learner = build_learner(checkpoint)
    metrics = [learner.step(batches(update)) for update in range(UPDATES)]
    engine = Qwen3VL(learner.config).requires_grad_(False)
    synced = push_weights(learner.model, engine)
    digest = [parameter.double().sum().item() for parameter in engine.parameters()]
    save_checkpoint(out / "checkpoints", learner, Progress(UPDATES, 11), keep=2)
    export_policy(learner, checkpoint, out / "policy")
    record = {"metrics": metrics, "copied": synced.bytes, "digest": digest}
    everyone = gather_objects([record])
    if rank() == 0:
        (out / "ranks.json").write_text(json.dumps(everyone))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    finish()

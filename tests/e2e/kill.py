"""kill -9 at random instants of a real run, which must end as the undisturbed one, bit for bit.

`python -m tests.e2e.kill [--kills 20] [--seed N]` prints where each kill landed: they aim in turn at the rollouts
(resampling is in them), the update and the writing of a checkpoint. Every other three lives write asynchronously.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.lives import Life, Lives
from tests.e2e.runs import metrics, without_time

AIMS = ("rollout", "train", "checkpoint")
TINY = {
    "rollout.questions_per_step": 4,
    "rollout.max_new_tokens": 64,
    "algo.group_size": 4,
    "algo.resamples_per_prefix": 2,
    "algo.budget_ratio": 0.5,
    "optim.lr": 1e-4,
    "eval.questions": 0,
    "checkpoint.every": 1,
    "log.tensorboard": False,
    "log.trees_in_report": 1,
}


@dataclass
class Kill:
    """Where a kill landed: what the rank's own file says, and whether a checkpoint was being written."""

    aim: str
    phase: str
    step: int
    writing: bool
    whole: int
    saved: int
    asynchronous: bool


def arguments(directory: Path, name: str, steps: int, **options: object) -> list[str]:
    values = {**TINY, "run.dir": directory, "run.name": name, "run.steps": steps}
    values |= {key.replace("__", "."): value for key, value in options.items()}
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]


def whereabouts(run: Path, pid: int) -> tuple[str, int]:
    """(phase, step) of the life `pid`, ("", 0) before it has told."""
    try:
        told = json.loads((run / "ranks" / "rank_0.json").read_text())
    except (OSError, ValueError):
        return "", 0
    return (told["phase"], told["step"]) if told["pid"] == pid else ("", 0)


def writing(run: Path) -> bool:
    return any((run / "checkpoints").glob(".tmp-*"))


def saved(run: Path) -> int:
    found = [path for path in (run / "checkpoints").glob("step_*") if (path / "state.json").exists()]
    return max((int(path.name[5:]) for path in found), default=0)


def kill_once(life: Life, run: Path, aim: str, skip: int, wait: float, asynchronous: bool, timeout: float = 60) -> Kill:
    """Waits until the life is where the aim is, `skip` steps on, then `wait` seconds more, and kills it."""
    first, until = 0, time.monotonic() + timeout
    while True:
        phase, step = whereabouts(run, life.pid)
        first = first or step
        there = writing(run) if aim == "checkpoint" else phase == aim
        if first and step >= first + skip and there:
            break
        assert not life.over, f"the run ended before it was in {aim}:\n{life.output[-3000:]}"
        assert time.monotonic() < until, f"not in {aim} after {timeout} s:\n{life.output[-3000:]}"
        time.sleep(0.001)
    time.sleep(wait)
    life.kill()
    assert life.wait() == -9, life.output[-3000:]
    phase, step = whereabouts(run, life.pid)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    whole = sum(line.endswith("\n") for line in lines)
    return Kill(aim, phase, step, writing(run), whole, saved(run), asynchronous)


def kill_many(lives: Lives, kills: int, seed: int, directory: Path) -> list[Kill]:
    """`kills` lives of one run are killed and the next one finishes it; AssertionError where it is not the same run."""
    rng = random.Random(seed)
    steps, run = kills + 4, directory / "killed"
    undisturbed = lives.start(*arguments(directory, "undisturbed", steps))
    landed = []
    for index in range(kills):
        asynchronous = index // len(AIMS) % 2 == 0
        resume = (run / "config.toml").exists()
        options = arguments(directory, "killed", steps, run__resume=resume, checkpoint__asynchronous=asynchronous)
        spare = steps - 2 - saved(run) - (kills - index)
        skip = rng.randrange(2) if spare > 0 else 0
        life = lives.start(*options)
        kill = kill_once(life, run, AIMS[index % len(AIMS)], skip, rng.uniform(0.0, 0.15), asynchronous)
        # What is lost is the step in flight; and one more where its checkpoint was being written beside it.
        assert kill.saved >= kill.step - 1 - kill.asynchronous, kill
        landed.append(kill)
        print(f"kill {index + 1}/{kills}: {kill}", flush=True)
    last = lives.start(*arguments(directory, "killed", steps, run__resume=True))
    assert last.wait() == 0, last.output[-3000:]
    assert undisturbed.wait() == 0, undisturbed.output[-3000:]
    same(directory / "undisturbed", run, steps)
    return landed


def same(one: Path, other: Path, steps: int) -> None:
    """Weights, metrics and every trajectory, to the last bit."""
    assert without_time(metrics(one)) == without_time(metrics(other))
    names = [f"trajectories/step_{step:06d}.jsonl" for step in range(1, steps + 1)]
    for name in ("policy/model.safetensors", *names):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert len([*(other / "trajectories").iterdir()]) == steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="axpo-kill-") as temporary, Lives(Path(temporary)) as opened:
        landed = kill_many(opened, chosen.kills, chosen.seed, Path(temporary))
    phases = Counter(kill.phase for kill in landed)
    during = sum(kill.writing for kill in landed)
    print(f"{len(landed)} kills, by phase {dict(phases)}, {during} while a checkpoint was being written")
    print(f"the same weights, metrics and trajectories as the undisturbed run; {time.monotonic() - begun:.0f} s")

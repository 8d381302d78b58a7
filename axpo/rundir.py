"""The run directory: made once, never silently reused, and every file in it is whole whenever the process dies."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axpo.config import Config, SftConfig, to_toml
from axpo.trajectory import Trajectory

CHECKPOINT_STATE = "state.json"  # the file that every checkpoint directory holds
_STEP = re.compile(r"step_(\d{6,})(?:\.jsonl?)?$")
# What may differ on a resume, because it changes nothing that is computed. run.steps may only grow.
_FREE = ("run.dir", "run.resume", "run.steps", "rollout.kv_cache_bytes", "rollout.max_batch_tokens")
_FREE_SECTIONS = ("checkpoint", "log", "debug")


class RunDirError(ValueError):
    """The run directory is there and should not be, or is not and should, or belongs to another configuration."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """Where a run's files are. `checkpoint_step` is the step that it continues from, 0 for a new run."""

    path: Path
    checkpoint_step: int = 0

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def policy(self) -> Path:
        return self.path / "policy"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def trajectories(self, step: int) -> Path:
        return self.path / "trajectories" / f"step_{step:06d}.jsonl"

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:06d}"

    def evaluation(self, step: int) -> Path:
        return self.path / "evaluation" / f"step_{step:06d}.json"

    def debug(self, step: int) -> Path:
        """Where an update that met NaN or infinity is kept."""
        return self.path / "debug" / f"step_{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; one that is still being written has another name."""
        folder = self.path / "checkpoints"
        return sorted(_step(entry.name) for entry in folder.glob("step_*") if (entry / CHECKPOINT_STATE).is_file())

    def write_trajectories(self, step: int, trajectories: Iterable[Trajectory]) -> None:
        """All trajectories of a step, atomically: the file is there and whole, or not there."""
        write_text(self.trajectories(step), "".join(f"{trajectory.to_json()}\n" for trajectory in trajectories))


def open_run_dir(config: Config | SftConfig, *, rank: int = 0) -> RunDir:
    """Make `<run.dir>/<run.name>/`, or with run.resume return to it as it was at its last complete checkpoint.

    On a resume the trajectories, evaluations and metrics of later steps are removed, since those steps are computed
    again; without any checkpoint the run starts over. policy/ and report.html stay until the end of the run replaces
    them. Only rank 0 checks and writes; the others wait for it at a barrier of the caller's, then ask `continue_from`.

    Raises RunDirError; nothing has been changed then.
    """
    run = config.run
    path = Path(run.dir) / run.name
    if rank != 0:
        return RunDir(path)
    if run.resume:
        _check_resumable(path, config)
        run_dir = continue_from(path)
        _forget_after(run_dir)
    else:
        if path.is_dir() and any(path.iterdir()):
            raise RunDirError(
                f"run directory {path} exists: continue it with --run.resume, or name the new run with --run.name "
                f"(now {run.name!r})"
            )
        if path.exists() and not path.is_dir():
            raise RunDirError(f"run directory {path} is a file; choose another --run.name (now {run.name!r})")
        run_dir = RunDir(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(f"run directory {path} cannot be made: {error}; set --run.dir") from None
    write_text(run_dir.config, to_toml(config))
    for folder in ("trajectories", "checkpoints"):
        (path / folder).mkdir(exist_ok=True)
    return run_dir


def continue_from(path: Path) -> RunDir:
    """The run directory at its last complete checkpoint, on any rank."""
    return RunDir(path, checkpoint_step=max(RunDir(path).checkpoint_steps(), default=0))


def write_text(path: Path, text: str) -> None:
    """Replace the file by `text` in one step: a reader, or a crash, finds the old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """As `write_text`; not-a-number and infinity are errors, since JSON has neither."""
    write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def _check_resumable(path: Path, config: Config | SftConfig) -> None:
    run = config.run
    if not (path / "config.toml").is_file():
        raise RunDirError(
            f"run directory {path} holds no run to resume (no config.toml); "
            f"leave out --run.resume, or check --run.name (now {run.name!r}) and --run.dir (now {run.dir!r})"
        )
    try:
        before = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RunDirError(f"{path / 'config.toml'} is not valid TOML: {error}") from None
    now = tomllib.loads(to_toml(config))
    if now["run"]["steps"] < before["run"]["steps"]:
        raise RunDirError(f"--run.steps {run.steps}: the run has {before['run']['steps']}; a resume may only extend it")
    changed = [
        f"{name} ({_get(before, name)!r} before, {_get(now, name)!r} now)"
        for name in sorted({f"{s}.{k}" for c in (before, now) for s, fields in c.items() for k in fields})
        if _get(before, name) != _get(now, name) and name not in _FREE and name.split(".")[0] not in _FREE_SECTIONS
    ]
    if changed:
        raise RunDirError(
            f"run directory {path} was made with another configuration: {'; '.join(changed)}. Resume with the same: "
            f"{path / 'config.toml'} can be given as the recipe"
        )


def _get(config: dict[str, dict[str, Any]], name: str) -> Any:
    section, field = name.split(".")
    return config.get(section, {}).get(field)


def _forget_after(run_dir: RunDir) -> None:
    """Remove what was written for steps behind the checkpoint; metrics last, since they say how far the run came."""
    step, path = run_dir.checkpoint_step, run_dir.path
    for file in [*(path / "trajectories").glob("step_*"), *(path / "evaluation").glob("step_*")]:
        if _step(file.name) > step:
            file.unlink()
    if run_dir.metrics.exists():
        _keep_lines_until(run_dir.metrics, step)


def _keep_lines_until(path: Path, step: int) -> None:
    """Keep the whole lines of steps 0 to `step`, none when the run starts over; a line that a crash cut short goes."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if step > 0 and line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            continue
    write_text(path, "".join(kept))


def _step(name: str) -> int:
    """The step of step_000001, step_000001.jsonl or step_000001.json; -1 for another name."""
    match = _STEP.match(name)
    return int(match[1]) if match else -1


def fsync(path: Path) -> None:
    """Make a file's content, or the renames in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

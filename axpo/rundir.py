"""The run directory: made once, never silently reused, and every file in it is whole whenever the process dies."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axpo.checkpoint_record import Record, newest
from axpo.config import Config, SftConfig, to_toml
from axpo.resume import Identity, fixed_settings
from axpo.trajectory import Trajectory

_STEP = re.compile(r"step_(\d{6,})(?:\.jsonl?)?$")


class RunDirError(ValueError):
    """The run directory is there and should not be, or is not and should, or belongs to another configuration."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """Where a run's files are. `checkpoint_step` is the step that it continues from, 0 for a new run.

    metrics_bytes: where metrics.jsonl ended at that step.
    identity: the settings and the data that a resume must share.
    """

    path: Path
    checkpoint_step: int = 0
    metrics_bytes: int = 0
    identity: Identity = field(default_factory=Identity)

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

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def ranks(self) -> Path:
        return self.path / "ranks"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def evaluation(self, step: int) -> Path:
        return self.path / "evaluation" / f"step_{step:06d}.json"

    def debug(self, step: int) -> Path:
        """Where an update that met NaN or infinity is kept."""
        return self.path / "debug" / f"step_{step:06d}"

    def write_trajectories(self, step: int, trajectories: Iterable[Trajectory]) -> None:
        """All trajectories of a step, atomically: the file is there and whole, or not there."""
        write_text(self.trajectories(step), "".join(f"{trajectory.to_json()}\n" for trajectory in trajectories))


def open_run_dir(config: Config | SftConfig, data: Mapping[str, Any], agents: Sequence[str] = ()) -> RunDir:
    """Make `<run.dir>/<run.name>/`, or with run.resume return to it as it was at its newest whole checkpoint.

    On a resume what was written for later steps is removed, since those steps are computed again: trajectories,
    evaluations, and metrics.jsonl behind the place where it ended at the checkpoint. Without any checkpoint the run
    starts over. policy/ and report.html stay until the end of the run replaces them. One rank calls this for all.

    Args:
        data: the fingerprint of the training data.
        agents: torchrun's agents of all ranks; what one of them opened before is resumed without being told to.

    Raises RunDirError or CheckpointError; nothing has been changed then.
    """
    run = config.run
    path, identity = Path(run.dir) / run.name, Identity.of(config, data)
    if run.resume or _restarted(path, agents):
        run_dir, passed_over = _resume(path, config, identity)
        for problem in passed_over:
            print(f"{problem}; continuing from step {run_dir.checkpoint_step}", file=sys.stderr, flush=True)
        _forget_after(run_dir)
    else:
        if path.is_dir() and any(path.iterdir()):
            raise RunDirError(
                f"run directory {path} exists: continue it with --run.resume, or name the new run with --run.name "
                f"(now {run.name!r})"
            )
        if path.exists() and not path.is_dir():
            raise RunDirError(f"run directory {path} is a file; choose another --run.name (now {run.name!r})")
        run_dir = RunDir(path, identity=identity)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(f"run directory {path} cannot be made: {error}; set --run.dir") from None
    write_text(run_dir.config, to_toml(config))
    write_json(path / "launch.json", {"agents": list(agents)})
    for folder in ("trajectories", "checkpoints", "ranks"):
        (path / folder).mkdir(exist_ok=True)
    return run_dir


def agent() -> str | None:
    """The torchrun process that started this one, by host, process id and start; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    parent = os.getppid()
    started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()}/{parent}/{started}"


def _restarted(path: Path, agents: Sequence[str]) -> bool:
    """Whether the run directory was opened by an earlier life of the same launch: by one of the same agents."""
    try:
        return not set(json.loads((path / "launch.json").read_text())["agents"]).isdisjoint(agents)
    except (OSError, ValueError, KeyError):
        return False


def write_text(path: Path, text: str) -> None:
    """Replace the file by `text` in one step: a reader, or a crash, finds the old content or the new one.

    Raises RunDirError where the file system refuses, a full one for example.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from None
        raise
    fsync(path.parent)


def cannot_write(path: Path, error: OSError) -> RunDirError:
    """The error of a run that can no longer write to its directory."""
    return RunDirError(f"{path} could not be written: {error}; make room there, then continue with --run.resume")


def write_json(path: Path, value: Any) -> None:
    """As `write_text`; not-a-number and infinity are errors, since JSON has neither."""
    write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def _resume(path: Path, config: Config | SftConfig, now: Identity) -> tuple[RunDir, list[str]]:
    """The run at its newest whole checkpoint and why newer ones were passed over; RunDirError where it is another."""
    run = config.run
    if not (path / "config.toml").is_file():
        raise RunDirError(
            f"run directory {path} holds no run to resume (no config.toml); "
            f"leave out --run.resume, or check --run.name (now {run.name!r}) and --run.dir (now {run.dir!r})"
        )
    try:
        toml = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RunDirError(f"{path / 'config.toml'} is not valid TOML: {error}") from None
    steps = toml.get("run", {}).get("steps", 0)
    if run.steps < steps:
        raise RunDirError(f"--run.steps {run.steps}: the run has {steps}; a resume may only extend it")
    checkpoint, passed_over = newest(path / "checkpoints")
    if checkpoint is None:  # it starts over, and any data will do
        run_dir, before = RunDir(path, identity=now), Identity(fixed_settings(toml), now.data)
    else:
        record = Record.read(checkpoint)
        run_dir, before = RunDir(path, record.progress.step, record.progress.metrics_bytes, now), record.identity
    if changed := now.differences(before):
        lines = "".join(f"\n{change}" for change in changed)
        raise RunDirError(
            f"run directory {path} was made with other settings or data; resume it with the same "
            f"({path / 'config.toml'} can be given as the recipe), or name a new run with --run.name:{lines}"
        )
    return run_dir, passed_over


def _forget_after(run_dir: RunDir) -> None:
    """Remove what was written for steps behind the checkpoint; metrics last, since they say how far the run came."""
    step, path = run_dir.checkpoint_step, run_dir.path
    for file in [*(path / "trajectories").glob("step_*"), *(path / "evaluation").glob("step_*")]:
        if _step(file.name) > step:
            file.unlink()
    if run_dir.metrics.exists() and run_dir.metrics.stat().st_size > run_dir.metrics_bytes:
        os.truncate(run_dir.metrics, run_dir.metrics_bytes)


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

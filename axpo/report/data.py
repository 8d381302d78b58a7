"""Reads a run directory for the report: what is missing or cut short is noted, not fatal."""

import json
import math
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axpo.report.axis import Point
from axpo.trajectory import Trajectory


class ReportError(ValueError):
    """There is nothing to report on; the message names the path and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory's content. `notes` are sentences about what could not be read; config values may be missing.

    steps: the objects of metrics.jsonl, ascending by step. evaluations: those of evaluation/, likewise.
    trajectories: (step, file), ascending.
    """

    path: Path
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    trajectories: list[tuple[int, Path]]
    notes: list[str] = field(default_factory=list)

    def setting(self, name: str, default: Any = None) -> Any:
        """The config value `section.field`."""
        section, _, leaf = name.partition(".")
        values = self.config.get(section)
        return values.get(leaf, default) if isinstance(values, dict) else default

    def points(self, metric: str) -> list[Point]:
        """(step, value) of every step, None where the step has no such number; [] when no step has one."""
        points = [(float(record["step"]), _finite(record.get(metric))) for record in self.steps]
        return points if any(value is not None for _, value in points) else []

    def ends(self, metric: str) -> tuple[float, float] | None:
        """Its mean over the first and the last tenth of the steps that have it (at most 10 each)."""
        values = [value for _, value in self.points(metric) if value is not None]
        if not values:
            return None
        count = min(10, max(1, len(values) // 10))
        return sum(values[:count]) / count, sum(values[-count:]) / count

    def mean(self, metric: str) -> float | None:
        values = [value for _, value in self.points(metric) if value is not None]
        return sum(values) / len(values) if values else None


def load_run(path: Path) -> Run:
    """Reads everything but the trajectories.

    Raises:
        ReportError: no such directory, or no complete step and no evaluation in it.
    """
    if not path.is_dir():
        raise ReportError(f"{path}: no such directory; give a run directory, <run.dir>/<run.name>")
    notes: list[str] = []
    steps = _read_metrics(path / "metrics.jsonl", notes)
    evaluations = _read_evaluations(path / "evaluation", notes)
    if not steps and not evaluations:
        reason = "; ".join(notes) or f"{path / 'metrics.jsonl'} holds no complete step"
        raise ReportError(f"{path}: nothing to report yet: {reason}")
    files = [
        (int(match[1]), file) for file in (path / "trajectories").glob("step_*.jsonl") if (match := _STEP(file.name))
    ]
    if not files:
        notes.append("There are no trajectory files: no trees are drawn, and confidence is not compared with entropy.")
    return Run(path, _read_config(path / "config.toml", notes), steps, evaluations, sorted(files), notes)


def read_trajectories(file: Path, containing: str = "") -> Iterator[Trajectory]:
    """The trajectories of a step, one at a time; lines without `containing` are not even parsed.

    A line that cannot be read ends the file: a crash cut it short.
    """
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if containing in line:
                try:
                    yield Trajectory.from_json(line)
                except (ValueError, TypeError, KeyError, AttributeError):
                    return


_STEP = re.compile(r"step_(\d+)\.jsonl?$").match


def _read_config(file: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append("config.toml is missing: the settings of the run are not known.")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        notes.append(f"config.toml cannot be read: {error}.")
    return {}


def _read_metrics(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """A step that was logged twice, before and after a resume, counts as logged last."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        notes.append(f"{file.name} cannot be read: {error.strerror or error}")
        return []
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = record["step"]
            if isinstance(step, bool) or not isinstance(step, int):
                raise TypeError
            steps[step] = record
        except (ValueError, TypeError, KeyError):
            what = "is cut short" if number == len(lines) else "is not an object with a step"
            notes.append(f"Line {number} of {file.name} {what} and was left out.")
    return [steps[step] for step in sorted(steps)]


def _read_evaluations(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    found = []
    for file in sorted(folder.glob("step_*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(record["summary"], dict) or not isinstance(record["step"], int):
                raise TypeError("summary or step is of another type")
            found.append(record)
        except (OSError, ValueError, TypeError, KeyError) as error:
            notes.append(f"evaluation/{file.name} cannot be read and was left out ({error}).")
    return sorted(found, key=lambda record: record["step"])


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)

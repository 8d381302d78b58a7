"""What a run tells: metrics.jsonl, TensorBoard, Weights & Biases, the console; and where a step's seconds go."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from axpo.rundir import RunDir

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from axpo.config import Log

# The few numbers that matter while a run goes on: label, metric, format.
CONSOLE = (
    ("reward", "reward/mean", "{:.3f}"),
    ("tool use", "tool/rate", "{:.0%}"),
    ("right with tool", "tool/accuracy", "{:.0%}"),
    ("restored", "resample/restore_rate", "{:.0%}"),
    ("s/step", "perf/step_s", "{:.1f}"),
)


class MetricsLogger:
    """Writes one flat object `{"step": n, "group/name": value, …}` a step; on ranks other than 0 it does nothing.

    A line is appended and flushed in one write. Values are numbers; None, NaN and infinity are written as null: there
    was nothing to measure in this step. A context manager that closes on exit.

    wandb: project of Weights & Biases that also gets them; empty: none.
    """

    def __init__(
        self,
        run_dir: RunDir,
        *,
        steps: int,
        rank: int = 0,
        tensorboard: bool = True,
        console: bool = True,
        wandb: str = "",
        columns: tuple[tuple[str, str, str], ...] = CONSOLE,
    ):
        self._active = rank == 0
        self._file: TextIO | None = None
        self._progress: ConsoleProgress | None = None
        self._writer: SummaryWriter | None = None
        self._wandb: Any = None
        if not self._active:
            return
        self._file = run_dir.metrics.open("a", encoding="utf-8")
        if console:
            self._progress = ConsoleProgress(run_dir.path.name, steps, run_dir.checkpoint_step, columns)
        if tensorboard:
            self._writer = _summary_writer(run_dir)
        if wandb:
            self._wandb = _wandb_run(run_dir, wandb)

    def log(self, step: int, metrics: Mapping[str, float | int | bool | None]) -> None:
        """Record a step's metrics; ValueError on a name without a group, or a value that is not a number."""
        if not self._active:
            return
        values = {name: _number(name, value) for name, value in metrics.items()}
        assert self._file is not None
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in values.items() if value is not None}, step=step)
        if self._progress is not None:
            self._progress.update(step, values)

    def print(self, renderable: Any) -> None:
        """Show text or a rich table above the progress bar."""
        if self._progress is not None:
            self._progress.print(renderable)

    def close(self) -> None:
        """Make metrics.jsonl durable and end the progress bar; closing twice is harmless."""
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._progress is not None:
            self._progress.close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ConsoleProgress:
    """One progress bar on a terminal; one line a step where output goes to a file."""

    def __init__(self, name: str, steps: int, done: int, columns: tuple[tuple[str, str, str], ...] = CONSOLE):
        self._columns, self._steps = columns, steps
        self._console = Console(file=sys.stdout)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            shown = TextColumn("{task.fields[numbers]}")
            title = TextColumn("{task.description}")
            self._bar = Progress(
                title, BarColumn(), MofNCompleteColumn(), shown, TimeRemainingColumn(), console=self._console
            )
            self._task = self._bar.add_task(name, total=steps, completed=done, numbers="")
            self._bar.start()

    def update(self, step: int, values: Mapping[str, float | int | None]) -> None:
        numbers = "  ".join(
            f"{label} {'–' if values[name] is None else form.format(values[name])}"
            for label, name, form in self._columns
            if name in values
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif numbers:
            print(f"step {step}/{self._steps}  {numbers}", flush=True)

    def print(self, renderable: Any) -> None:
        self._console.print(renderable)
        self._console.file.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table for `MetricsLogger.print`: the first column is text, the others are numbers."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


class Spans:
    """Seconds of a step by what they went to: `with spans("rollout"): …`, and at the end of the step `spans.metrics()`.

    A span inside another is taken out of the outer one, so that the parts never count a second twice. `synchronize` is
    called at both ends of a span where work runs asynchronously (torch.cuda.synchronize).
    """

    def __init__(self, synchronize: Callable[[], object] | None = None):
        self._synchronize = synchronize
        self._restart()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            took = self._now() - begun
            self._seconds[name] = self._seconds.get(name, 0.0) + took - self._inner.pop()
            if self._inner:
                self._inner[-1] += took

    def move(self, source: str, target: str, seconds: float) -> None:
        """Counts this much of a span that has ended (all of it at most) to another, which was measured elsewhere."""
        seconds = min(seconds, self._seconds[source])
        self._seconds[source] -= seconds
        self._seconds[target] = self._seconds.get(target, 0.0) + seconds

    def metrics(self) -> dict[str, float]:
        """`perf/<name>_s` of every span, `perf/unaccounted_s` the rest, `perf/step_s` their sum; since last called."""
        if self._inner:
            raise RuntimeError("Spans.metrics() was called inside a span: its seconds are not known yet")
        total = self._now() - self._begun
        parts = {f"perf/{name}_s": seconds for name, seconds in self._seconds.items()}
        parts["perf/unaccounted_s"] = max(0.0, total - sum(parts.values()))
        self._restart()
        return {**parts, "perf/step_s": total}

    def _restart(self) -> None:
        self._seconds: dict[str, float] = {}
        self._inner: list[float] = []
        self._begun = self._now()

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()


def _number(name: str, value: Any) -> float | int | None:
    if "/" not in name:
        raise ValueError(f"metric {name!r}: its name has no group; call it group/{name}")
    if value is None:
        return None
    if isinstance(value, Integral):  # bool and NumPy's integers too
        return int(value)
    try:
        value = float(value)  # NumPy scalars and tensors of one element
    except (TypeError, ValueError):
        raise ValueError(f"metric {name!r} = {value!r}: not a number") from None
    return value if math.isfinite(value) else None


def check_sinks(log: Log) -> None:
    """Raises ValueError when a sink that the recipe asks for is not installed."""
    found = importlib.util.find_spec("wandb") if log.wandb else None
    if log.wandb and (found is None or found.origin is None):  # a folder of old runs looks like a package, too
        raise ValueError("log.wandb = true: wandb is not installed; pip install wandb, or set --log.wandb false")


def _wandb_run(run_dir: RunDir, project: str) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]

    # One id for the run directory, so that a resume goes on in the same run and overwrites steps computed again.
    identity = hashlib.blake2b(str(run_dir.path.resolve()).encode(), digest_size=8).hexdigest()
    return wandb.init(project=project, name=run_dir.path.name, id=identity, resume="allow", dir=str(run_dir.path))


def _summary_writer(run_dir: RunDir) -> SummaryWriter:
    from torch.utils.tensorboard.writer import SummaryWriter  # seconds to import

    # Events of steps that a resume computes again are hidden.
    return SummaryWriter(log_dir=str(run_dir.tensorboard), purge_step=run_dir.checkpoint_step + 1)

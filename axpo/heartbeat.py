"""Where every rank is: each tells it in a small file, so that the others can say who is missing, and since when."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from axpo.distributed import rank, world_size
from axpo.metrics import Spans

BEAT_S = 5.0


@dataclass(slots=True)
class Whereabouts:
    """since: when the phase began; beat: when the process was last known to run; both in seconds since the epoch."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    since: float
    beat: float

    @property
    def trouble(self) -> str | None:
        """'is dead', 'is stopped' or 'has not been heard of for 60 s'; None for a rank that runs."""
        here = self.host == socket.gethostname()
        if here and (state := _state(self.pid)) in ("dead", "stopped"):
            return f"is {state}"
        silent = time.time() - self.beat
        return f"has not been heard of for {silent:.0f} s" if silent > 3 * BEAT_S else None

    @property
    def sentence(self) -> str:
        """'rank 1 (pid 77 on node-b) is dead; it was in step 3, rollout'"""
        who, where = f"rank {self.rank} (pid {self.pid} on {self.host})", f"step {self.step}, {self.phase}"
        if trouble := self.trouble:
            return f"{who} {trouble}; it was in {where}"
        return f"{who} is in {where}, for {time.time() - self.since:.0f} s"


class Heartbeat:
    """Writes `directory`/rank_0.json whenever the phase changes, and every few seconds by a thread.

    A context manager: an error that leaves it on one of several ranks prints where the others are, then goes on.

    Args:
        directory: on a file system that all ranks see.
        program: named in the message.
    """

    def __init__(self, directory: Path, program: str):
        self._directory, self._program = directory, program
        now = time.time()
        self._mine = Whereabouts(rank(), socket.gethostname(), os.getpid(), 0, "load", now, now)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._write()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def enter(self, phase: str, step: int | None = None) -> str:
        """Notes that a phase begins (and of which step, where that changes); returns the phase before."""
        with self._lock:
            before = self._mine.phase
            self._mine.phase, self._mine.since = phase, time.time()
            if step is not None:
                self._mine.step = step
        self._write()
        return before

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._over.set()
        if isinstance(error, Exception) and world_size() > 1:
            for line in self._report(error):
                print(f"{self._program}: error: {line}", file=sys.stderr, flush=True)

    def _report(self, error: Exception) -> Iterator[str]:
        """This rank and its error first, then the ranks that are elsewhere."""
        mine, text = self._mine, str(error).splitlines()
        yield f"rank {mine.rank}: step {mine.step}, {mine.phase}: {type(error).__name__}: {text[0] if text else ''}"
        others = [_read(self._directory, other) for other in range(world_size()) if other != mine.rank]
        for other, found in others:
            if found is None:
                yield f"rank {other} left no word in {self._directory}"
            elif (found.step, found.phase) != (mine.step, mine.phase) or found.trouble:
                yield found.sentence

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            self._write()

    def _write(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # a full disk is told of by what must be written
            self._mine.beat = time.time()
            file = _file(self._directory, self._mine.rank)
            new = file.with_suffix(".new")
            new.write_text(json.dumps(asdict(self._mine)))
            new.replace(file)


class TracedSpans(Spans):
    """Spans whose names are also this rank's phases."""

    def __init__(self, heartbeat: Heartbeat, synchronize: Callable[[], object] | None = None):
        super().__init__(synchronize)
        self._heartbeat = heartbeat

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = self._heartbeat.enter(name)
        with super().__call__(name):
            yield
        self._heartbeat.enter(before)  # not on an error: the report names the phase that it came from


def _file(directory: Path, rank: int) -> Path:
    return directory / f"rank_{rank}.json"


def _read(directory: Path, rank: int) -> tuple[int, Whereabouts | None]:
    try:
        return rank, Whereabouts(**json.loads(_file(directory, rank).read_text()))
    except (OSError, ValueError, TypeError):
        return rank, None


def _state(pid: int) -> str:
    """'runs', 'stopped', or 'dead': no process of this machine, or only an exit code that nobody fetched."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "dead"
    return "dead" if letter in "ZX" else "stopped" if letter in "Tt" else "runs"

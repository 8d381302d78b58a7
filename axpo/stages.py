"""Stages of a pipeline: public commands, each run once to its end, whatever kills it or the pipeline in between."""

import ctypes
import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from axpo.cli import ConfigError, resolve
from axpo.paths import ASSETS, MODELS
from axpo.rundir import write_json
from axpo.snapshot import changes
from axpo.tasks import task_names

_WAIT_S = 300.0  # for a stage that a killed pipeline left: it saves its step and ends
_PR_SET_PDEATHSIG = 1
# What a result does not depend on.
_FREE = ("run.resume", "run.time_limit", "run.timeout_s", "checkpoint.", "log.", "debug.")


@dataclass(frozen=True, slots=True)
class Stage:
    """One command. It is finished when it ended with 0 and `made` is there: a run that was stopped ends with 0 too.

    schema: of the commands that take a recipe; `recipe` is the one that they run by default. needs: the stages whose
    results it reads. resumes: its run directory, where it goes on by --run.resume; the other commands do by themselves.
    """

    name: str
    module: str
    words: list[str]
    made: Path
    schema: type[BaseModel] | None = None
    recipe: str = "mini"
    needs: tuple[str, ...] = ()
    resumes: Path | None = None

    def config(self) -> BaseModel | None:
        """Its configuration, None of a command without one; ConfigError when its words are wrong."""
        try:
            return self.schema and resolve(self.schema, self.words, recipe=self.recipe)
        except ConfigError as error:
            raise ConfigError("\n".join(f"stage {self.name}: {line}" for line in str(error).splitlines())) from None

    def settings(self) -> dict[str, Any]:
        """What its result depends on."""
        config = self.config()
        return {"words": self.words} if config is None else config.model_dump(mode="json")

    def reads(self) -> list[Path]:
        """The models and the rows that its settings name, as they are on disk; embedded tasks are not."""
        config = self.config()
        if config is None:
            named = [Path(word) for word in self.words[1:] if word not in task_names()]
            return [path for path in named if path != self.made and path.exists()]
        settings = config.model_dump()
        model, data = settings["model"]["path"], settings["data"]
        rows = [data["path"], data["heldout_path"]]
        if self.module == "axpo.evaluate":
            rows = [entry.partition("=")[2] or entry for entry in settings["eval"]["benchmarks"]]
        named = [ASSETS / model if model in MODELS else model, *rows]
        return [Path(path) for path in named if path and path not in task_names() and Path(path).exists()]

    def command(self, nproc: int) -> list[str]:
        """As it is started now; on `nproc` processes where it takes a recipe."""
        module = ["-m", self.module]
        if self.schema is not None and nproc > 1:
            module = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc), *module]
        resume = ["--run.resume"] if self.resumes is not None and (self.resumes / "config.toml").exists() else []
        return [sys.executable, *module, *self.words, *resume]


class Record:
    """What is finished: a file a stage, with the settings it had, the state of the files that it read, and when those
    stages that it needs were finished.

    Raises:
        ValueError: a finished stage had other settings than now, read files that have changed, or one that it needs was
            run again after it.
    """

    def __init__(self, folder: Path, stages: Sequence[Stage]):
        self._folder = folder
        settings = {stage.name: json.loads(json.dumps(stage.settings())) for stage in stages}
        self.finished: dict[str, dict[str, Any]] = {}
        for stage in stages:
            if not self._file(stage).exists():
                continue
            kept = json.loads(self._file(stage).read_text())
            again = f"name another folder with --pipeline.name, or delete {self._file(stage)} and {stage.made}"
            for name, before, now in _differences(kept["settings"], settings[stage.name]):
                raise ValueError(f"stage {stage.name} was run with {name} = {before!r}, now {now!r}; {again}")
            for need in stage.needs:
                if kept["after"][need] != self.finished.get(need, {}).get("time"):
                    raise ValueError(f"stage {stage.name} was run with the results of another {need}; {again}")
            for change in changes(kept.get("read", {})):
                raise ValueError(f"stage {stage.name} has read what has changed since: {change}; {again}")
            self.finished[stage.name] = kept
        self._settings = settings

    def finish(self, stage: Stage, seconds: float, read: dict[str, dict[str, str]]) -> None:
        """`read`: the snapshot of its files from before it was started."""
        after = {need: self.finished[need]["time"] for need in stage.needs}
        kept = {"time": time.time(), "seconds": seconds, "after": after, "settings": self._settings[stage.name]}
        kept["read"] = read
        write_json(self._file(stage), kept)
        self.finished[stage.name] = kept

    def _file(self, stage: Stage) -> Path:
        return self._folder / f"{stage.name}.json"


class Runner:
    """Starts stages one at a time. SIGTERM, SIGUSR1 and Ctrl-C end the one that runs, which saves where it can."""

    def __init__(self, lock: int):
        self._lock = lock
        self._process: subprocess.Popen[bytes] | None = None
        self.stopped: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def run(self, command: list[str]) -> int:
        """The exit code, negative for a signal. The stage ends with this process and holds the folder's lock."""
        # A group of its own: Ctrl-C reaches it as the SIGTERM that it knows how to end by.
        self._process = subprocess.Popen(
            command, pass_fds=(self._lock,), process_group=0, preexec_fn=_end_with_parent, stdin=subprocess.DEVNULL
        )
        if self.stopped is not None:
            self._process.terminate()  # asked to while it started
        return self._process.wait()

    def _pass_on(self, number: int, _: object) -> None:
        self.stopped = signal.Signals(number)
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Only one pipeline works in `folder`: the lock's descriptor, which stages inherit, so that it outlives a kill.

    Raises:
        ValueError: the folder cannot be made, another one works there, or a stage of a killed one does not end.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made: {error.strerror}; set pipeline.dir") from None
    with (folder / "lock").open("w") as file:
        until, told = time.monotonic() + _WAIT_S, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ValueError(f"{folder}: another pipeline, or a stage of a killed one, works here") from None
            if not told:
                print(f"waiting for what works in {folder} to end …", flush=True)
                told = True
            time.sleep(0.2)
        yield file.fileno()


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, value) of the settings that both have and that are not the same."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() & now.keys():
            yield from _differences(before[key], now[key], f"{name}.{key}" if name else key)
    elif before != now and not name.startswith(_FREE):
        yield name, before, now


def _end_with_parent() -> None:
    """SIGTERM when the pipeline is killed; after a fork, before the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

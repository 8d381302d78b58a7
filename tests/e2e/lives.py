"""Starts real runs from a process that has imported everything and has one thread: a life costs a fork.

`python -m tests.e2e.lives` serves one JSON command a line; `Lives` is its client.
"""

import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
IMPORTED = ("axpo.train", "axpo.run", "axpo.rollout", "axpo.report", "axpo.evaluate", "axpo.start", "axpo.tree")


@dataclass
class Life:
    """One `python -m axpo.train …`, a child of the server."""

    server: "Lives"
    pid: int
    log: Path

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    @property
    def over(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def wait(self) -> int:
        """The exit code; minus the signal's number where one ended it."""
        return self.server.ask(wait=self.pid)["code"]

    @property
    def output(self) -> str:
        return self.log.read_text()


class Lives:
    """A context manager; every life that is left ends with it."""

    def __init__(self, logs: Path):
        self._logs, self._count = logs, 0
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.e2e.lives"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment)

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *argv: str, largest_file: int | None = None, **environment: object) -> Life:
        """`axpo.train` with these arguments; no file of it can grow beyond `largest_file` bytes."""
        self._count += 1
        log = self._logs / f"life_{self._count}.log"
        variables = {name: str(value) for name, value in environment.items()}
        answer = self.ask(argv=list(argv), log=str(log), largest_file=largest_file, environment=variables)
        return Life(self, answer["pid"], log)

    def start_ranks(self, count: int, *argv: str) -> list[Life]:
        """One life a rank, as a launcher other than torchrun starts them."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [self.start(*argv, RANK=rank, LOCAL_RANK=rank, **shared) for rank in range(count)]

    def __enter__(self) -> "Lives":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def serve() -> None:
    children: set[int] = set()
    answers = os.fdopen(os.dup(1), "w")  # whatever an import prints goes elsewhere
    os.dup2(2, 1)
    import_everything()
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            _, status = os.waitpid(command["wait"], 0)
            children.discard(command["wait"])
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            threads = len([*Path("/proc/self/task").iterdir()])
            assert threads == 1, f"{threads} threads: a fork would copy one of them only"
            answer = {"pid": os.fork()}
            if answer["pid"] == 0:
                live(command)
            children.add(answer["pid"])
        print(json.dumps(answer), file=answers, flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def import_everything() -> None:
    """Modules, and what torch and transformers import only when they are first used."""
    for module in IMPORTED:
        importlib.import_module(module)
    import torch

    from axpo.cli import resolve
    from axpo.config import Config
    from axpo.inputs import check_inputs
    from engine.models import ModelConfig, Qwen3VL

    inputs = check_inputs(resolve(Config, [], recipe="mini"))
    inputs.conversation.processor.image(inputs.task.question("train", 0).images[0])
    with torch.device("meta"):
        Qwen3VL(ModelConfig.from_pretrained(inputs.source))


def live(command: dict[str, Any]) -> None:
    """The child: it becomes `python -m axpo.train …` and never returns."""
    from axpo.train import main

    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for ours, theirs in ((null, 0), (log, 1), (log, 2)):
        os.dup2(ours, theirs)
    if limit := command["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.environ |= command["environment"]
    sys.argv = ["axpo.train", *command["argv"]]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()

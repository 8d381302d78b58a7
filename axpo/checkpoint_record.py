"""What lies beside a checkpoint's tensors in state.json, and which checkpoints are whole; imports no torch."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from axpo.resume import Identity

STATE = "state.json"
_STEP = re.compile(r"step_(\d{6,})$")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names it and says what to do."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: steps done, question groups consumed from the data, bytes of metrics.jsonl."""

    step: int
    consumed_groups: int
    metrics_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """state.json. It is written last, so that a directory with one holds everything.

    files: (bytes, CRC-32) by name, of every file but this one.
    """

    progress: Progress
    updates: int
    world_size: int
    identity: Identity = field(default_factory=Identity)
    files: dict[str, list[int]]

    def to_json(self) -> str:
        values = {**asdict(self), "config_hash": self.identity.config_hash}
        return json.dumps(values, ensure_ascii=False, indent=1)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The record of the checkpoint directory `path`; raises CheckpointError."""
        file = path / STATE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            del values["config_hash"]
            values["progress"], values["identity"] = Progress(**values["progress"]), Identity(**values["identity"])
            return cls(**values)
        except FileNotFoundError:
            raise CheckpointError(f"{file}: missing; {path} is not a complete checkpoint") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file}: corrupt ({type(error).__name__}: {error})") from None

    def damage(self, path: Path) -> str | None:
        """What is wrong with the sizes of the files in `path`: a glance at each, no byte is read; None when whole."""
        for name, (size, _) in sorted(self.files.items()):
            file = path / name
            if not file.is_file():
                return f"{file}: missing"
            if (there := file.stat().st_size) != size:
                wrong = "truncated" if there < size else "too long"
                return f"{file}: {wrong} ({there} bytes of {size})"
        return None


def step_of(path: Path) -> int | None:
    """10 for step_000010; None for another name, those of unfinished and removed checkpoints among them."""
    match = _STEP.match(path.name)
    return int(match[1]) if match else None


def newest(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of `directory`, and why each newer one was passed over.

    Raises:
        CheckpointError: there are checkpoints and none is whole.
    """
    found = sorted((path for path in directory.glob("step_*") if step_of(path) is not None), key=lambda p: p.name)
    problems = []
    for path in reversed(found):
        try:
            problem = Record.read(path).damage(path)
        except CheckpointError as error:
            problem = str(error)
        if problem is None:
            return path, problems
        problems.append(problem)
    if problems:
        raise CheckpointError(
            f"no checkpoint in {directory} is whole: {'; '.join(problems)}. Bring one back, or remove {directory} to "
            "start over with --run.resume"
        )
    return None, []

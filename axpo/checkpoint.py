"""Checkpoints of a run: written whole or not at all, checked when read; and the policy as a Hugging Face directory."""

import json
import random
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from axpo.distributed import barrier, gather_objects, rank, world_size
from axpo.learner import Learner
from axpo.rundir import CHECKPOINT_STATE, fsync
from axpo.sharding import reshard
from engine.weights import save_pretrained


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: steps done, and question groups consumed from the data."""

    step: int
    consumed_groups: int


def save_checkpoint(directory: Path, learner: Learner, progress: Progress, keep: int) -> Path:
    """Writes `directory`/step_000010 (model, optimizer, random state, progress) and prunes to the newest `keep`.

    Everything goes to .tmp-step_000010 first and gets its name when all of it is on disk. Every rank calls this.
    """
    final = directory / f"step_{progress.step:06d}"
    temporary = directory / f".tmp-{final.name}"
    if rank() == 0:
        for leftover in directory.glob(".*-step_*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    barrier()
    save(_state(learner), checkpoint_id=temporary)
    torch.save(_random_state(), temporary / f"rng_rank{rank()}.pt")
    barrier()
    files = dict(
        gather_objects([(name, _fingerprint(temporary / name)) for name in _my_share(sorted(_names(temporary)))])
    )
    if rank() == 0:
        record = {**asdict(progress), "updates": learner.updates, "world_size": world_size(), "files": files}
        (temporary / CHECKPOINT_STATE).write_text(json.dumps(record, indent=1))
        for file in [*temporary.iterdir(), temporary]:
            fsync(file)
        replaced = directory / f".old-{final.name}"
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        fsync(directory)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in _complete(directory)[:-keep]:
            shutil.rmtree(old)
    barrier()
    return final


def load_checkpoint(path: Path, learner: Learner) -> Progress:
    """Restores learner and random state, bit for bit on the same number of ranks, and returns the progress.

    On another number of ranks model and optimizer are resharded and the random states stay as they are.

    Raises:
        FileNotFoundError, ValueError: a file is missing, truncated or corrupt; the message names it.
    """
    record = _read_state(path)
    problems = [_problem(path / name, record["files"][name]) for name in _my_share(sorted(record["files"]))]
    if found := sorted(problem for problem in gather_objects(problems) if problem):
        raise ValueError(f"{found[0]}; remove {path} to resume from the checkpoint before it")
    state = _state(learner)
    load(state, checkpoint_id=path)
    set_state_dict(
        learner.model,
        learner.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    learner.updates = record["updates"]
    if record["world_size"] == world_size():
        _set_random_state(torch.load(path / f"rng_rank{rank()}.pt"))
    return Progress(record["step"], record["consumed_groups"])


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint below `directory`; leftovers of an interrupted save do not count."""
    complete = _complete(directory)
    return complete[-1] if complete else None


def export_policy(learner: Learner, source: Path, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the policy as a Hugging Face directory with `source`'s config and tokenizer; every rank calls it."""
    reshard(learner.model)
    weights = {}
    for name, parameter in learner.model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if rank() == 0:
            weights[name] = full.detach().to("cpu", dtype)
    if rank() == 0:
        save_pretrained(weights, source, out)
    barrier()


def _state(learner: Learner) -> dict[str, Any]:
    reshard(learner.model)
    model, optimizer = get_state_dict(learner.model, learner.optimizer)
    return {"model": model, "optimizer": optimizer}


def _random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global state is what a library may use
    state = {
        "python": (version, words, gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _complete(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step_*") if (path / CHECKPOINT_STATE).is_file())


def _read_state(path: Path) -> dict[str, Any]:
    file = path / CHECKPOINT_STATE
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: missing; {path} is not a complete checkpoint") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: corrupt ({error}); remove {path} to resume from the one before it") from error


def _names(path: Path) -> list[str]:
    return [file.name for file in path.iterdir()]


def _my_share(names: list[str]) -> list[str]:
    return names[rank() :: world_size()]


def _fingerprint(file: Path) -> tuple[int, int]:
    """(bytes, CRC-32) of a file."""
    checksum, size = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
    return size, checksum


def _problem(file: Path, expected: list[int]) -> str | None:
    if not file.is_file():
        return f"{file}: missing"
    size, checksum = _fingerprint(file)
    if size != expected[0]:
        return (
            f"{file}: truncated ({size} bytes of {expected[0]})"
            if size < expected[0]
            else f"{file}: corrupt (too long)"
        )
    return None if checksum == expected[1] else f"{file}: corrupt (checksum differs)"

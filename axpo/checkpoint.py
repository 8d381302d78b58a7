"""Checkpoints of a run, by torch's DCP: written beside the training, whole or not at all, and checked when read."""

import shutil
import socket
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from axpo.checkpoint_record import STATE, CheckpointError, Progress, Record, newest, step_of
from axpo.distributed import barrier, cpu_group, gather_objects, rank, world_size
from axpo.learner import Learner
from axpo.random_state import get_random_state, set_random_state
from axpo.resume import Identity
from axpo.rundir import fsync
from axpo.sharding import reshard
from axpo.watched_files import WatchedWriter
from engine.weights import save_pretrained

T = TypeVar("T")


class Checkpointer:
    """Writes `directory`/step_000010 (model, optimizer, random state, progress) and prunes to the newest `keep`.

    `save` copies the state to CPU memory; a thread with a process group of its own writes the copy while training goes
    on, to a directory of another name that gets its own when all of it is on disk. One is written at a time. Every
    rank makes the same calls; a write that fails on one rank fails on all.

    Args:
        identity: the settings and data that a resume must share.
        asynchronous: False makes `save` wait.
        timeout_s: longest wait of the thread for another rank.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        identity: Identity | None = None,
        asynchronous: bool = True,
        timeout_s: float = 1800.0,
    ):
        self.directory, self.keep, self.asynchronous = directory, keep, asynchronous
        self.identity = identity or Identity()
        self._group = cpu_group(timeout_s)
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None

    def save(self, learner: Learner, progress: Progress) -> Path:
        """Takes the state of now, after the write before it has ended; returns the path that it will have.

        Raises:
            CheckpointError: this write (when not asynchronous) or the one before failed; what was there is untouched.
        """
        self.wait()
        state = _copy(_state(learner))
        final = self.directory / f"step_{progress.step:06d}"
        arguments = (final, state, get_random_state(), progress, learner.updates)
        # A daemon: a thread that waits for a rank that is gone must not keep this process alive.
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        if not self.asynchronous:
            self.wait()
        return final

    @property
    def failed(self) -> bool:
        """Whether a write has failed that `wait` has not told of."""
        return self._error is not None

    def wait(self) -> None:
        """Until the write in flight is on disk; raises CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, final: Path, state: Any, random_state: Any, progress: Progress, updates: int) -> None:
        try:
            self._write(final, state, random_state, progress, updates)
        except Exception as error:
            if rank() == 0:
                shutil.rmtree(_temporary(final), ignore_errors=True)
            free = shutil.disk_usage(self.directory).free >> 20
            self._error = CheckpointError(
                f"checkpoint {final} could not be written: {_reason(error)} ({free} MiB are free there). The ones "
                "before it are untouched: make room or lower checkpoint.keep, then continue with --run.resume"
            )

    def _write(self, final: Path, state: Any, random_state: Any, progress: Progress, updates: int) -> None:
        temporary = _temporary(final)
        self._on_rank_0(lambda: _prepare(temporary))
        self._save_tensors(state, WatchedWriter(temporary))
        self._everywhere(lambda: torch.save(random_state, temporary / f"rng_rank{rank()}.pt"))
        names = self._on_rank_0(lambda: sorted(file.name for file in temporary.iterdir()))
        shares = self._everywhere(lambda: [(name, _fingerprint(temporary / name)) for name in _my_share(names)])
        record = Record(
            progress=progress,
            updates=updates,
            world_size=world_size(),
            identity=self.identity,
            files=dict(entry for share in shares for entry in share),
        )
        self._on_rank_0(lambda: _commit(temporary, final, record, self.keep))

    def _save_tensors(self, state: Any, writer: WatchedWriter) -> None:
        try:
            save(state, storage_writer=writer, process_group=self._group)
        except CheckpointException as error:  # on every rank
            self._everywhere(lambda: _raise(writer.refusal))
            raise CheckpointError(_reason(error)) from error

    def _everywhere(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on every rank; an error on one of them is raised on all."""
        result, problem = None, None
        try:
            result = work()
        except Exception as error:
            problem = f"rank {rank()} on {socket.gethostname()}: {_reason(error)}"
        outcomes = gather_objects([(result, problem)], self._group)
        if problems := [problem for _, problem in outcomes if problem]:
            raise CheckpointError("; ".join(problems))
        return [result for result, _ in outcomes]

    def _on_rank_0(self, work: Callable[[], T]) -> T:
        result = self._everywhere(lambda: work() if rank() == 0 else None)[0]
        return result  # pyright: ignore[reportReturnType] - rank 0's


def save_checkpoint(directory: Path, learner: Learner, progress: Progress, keep: int) -> Path:
    """One checkpoint, on disk when this returns; every rank calls it."""
    return Checkpointer(directory, keep=keep, asynchronous=False).save(learner, progress)


def load_checkpoint(path: Path, learner: Learner) -> Progress:
    """Restores learner and random state, bit for bit on the same number of ranks, and returns the progress.

    On another number of ranks model and optimizer are resharded and the random states stay as they are.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, or the checkpoint is of another architecture; the
            message names it. The learner is as before.
    """
    record = Record.read(path)
    problems = [_problem(path / name, record.files[name]) for name in _my_share(sorted(record.files))]
    if found := sorted(problem for problem in gather_objects(problems) if problem):
        raise CheckpointError(f"{found[0]}; remove {path} to resume from the checkpoint before it")
    state = _state(learner)
    _check_architecture(path, state["model"])
    load(state, checkpoint_id=path)
    set_state_dict(
        learner.model,
        learner.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    learner.updates = record.updates
    if record.world_size == world_size():
        set_random_state(torch.load(path / f"rng_rank{rank()}.pt"))
    return record.progress


def latest(directory: Path) -> Path | None:
    """The newest whole checkpoint below `directory`; CheckpointError where there are some and none is whole."""
    return newest(directory)[0]


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


def _copy(state: Any) -> Any:
    """The same nested state with a copy in CPU memory for every tensor, of this rank's shard where it is sharded."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: _copy(value) for name, value in state.items()}
    return [_copy(value) for value in state] if isinstance(state, list) else state


def _check_architecture(path: Path, model: dict[str, torch.Tensor]) -> None:
    """The checkpoint must hold the parameters of `model`, by name and shape; DCP would fill what fits."""
    stored = {
        name.removeprefix("model."): tuple(entry.size)
        for name, entry in FileSystemReader(path).read_metadata().state_dict_metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    wanted = {name: tuple(parameter.shape) for name, parameter in model.items()}
    if wrong := sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name)):
        name = wrong[0]
        raise CheckpointError(
            f"{path}: checkpoint of another architecture: {name} is {stored.get(name, 'not there')} in it and "
            f"{wanted.get(name, 'not there')} in the model ({len(wrong)} such parameters); the model in model.path was "
            "changed since: bring the old one back, or start a new run with --run.name"
        )


def _temporary(final: Path) -> Path:
    return final.with_name(f".tmp-{final.name}")


def _prepare(temporary: Path) -> None:
    for leftover in temporary.parent.glob(".*-step_*"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)


def _commit(temporary: Path, final: Path, record: Record, keep: int) -> None:
    """Gives the written directory its name, then removes what is no longer kept; a crash in between loses nothing."""
    (temporary / STATE).write_text(record.to_json(), encoding="utf-8")
    for file in [*temporary.iterdir(), temporary]:
        fsync(file)
    directory = final.parent
    if final.exists():  # one that a resume passed over as damaged
        final.rename(directory / f".old-{final.name}")
    temporary.rename(final)
    fsync(directory)
    found = sorted(path for path in directory.glob("step_*") if step_of(path) is not None)
    kept = [path for path in found if _is_whole(path)][-keep:]
    for path in found:
        if path not in kept:
            path.rename(directory / f".old-{path.name}")
    for removed in directory.glob(".old-step_*"):
        shutil.rmtree(removed)


def _is_whole(path: Path) -> bool:
    try:
        return Record.read(path).damage(path) is None
    except CheckpointError:
        return False


def _my_share(names: list[str]) -> list[str]:
    return names[rank() :: world_size()]


def _fingerprint(file: Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    checksum, size = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
    return [size, checksum]


def _problem(file: Path, expected: list[int]) -> str | None:
    if not file.is_file():
        return f"{file}: missing"
    size, checksum = _fingerprint(file)
    if size != expected[0]:
        wrong = f"truncated ({size} bytes of {expected[0]})" if size < expected[0] else "corrupt (too long)"
        return f"{file}: {wrong}"
    return None if checksum == expected[1] else f"{file}: corrupt (checksum differs)"


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _reason(error: BaseException) -> str:
    """The error in one line."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {_reason(failure)}" for rank, (failure, _) in sorted(error.failures.items()))
    text = str(error).splitlines()
    return (
        (text[0] if text else "")
        if isinstance(error, CheckpointError)
        else f"{type(error).__name__}: {''.join(text[:1])}"
    )

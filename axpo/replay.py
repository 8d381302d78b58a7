"""An update that met NaN or infinity: kept with everything that it was made of, and made again under watch.

`<run>/debug/step_000007/` holds config.toml, rows_rank0.pt (each rank's packed rows, images included) and
checkpoint/ (weights, optimizer and random state as they were before the update).
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from axpo.checkpoint import Progress, latest, load_checkpoint, save_checkpoint
from axpo.cli import exit_with, load_config
from axpo.config import Config, to_toml
from axpo.distributed import barrier, device, finish, gather_objects, initialise, rank, world_size
from axpo.inputs import make_learner
from axpo.learner import Learner, Minibatch, NonFiniteError
from axpo.paths import model_directory
from axpo.rundir import write_text
from axpo.tree import PackedBatch
from engine.images import ImageInput
from engine.weights import check_weights

NON_FINITE = 3
"""Exit code of a run, and of a replay, that ended in NaN or infinity."""


def keep_update(directory: Path, config: Config, learner: Learner, minibatch: Minibatch) -> Path:
    """Writes what `replay` needs below `directory` and returns it; every rank calls it."""
    save_checkpoint(directory / "checkpoint", learner, Progress(learner.updates, 0), keep=1)
    rows = {"rows": [_row_state(row) for row in minibatch.rows], "old_logprobs": minibatch.old_logprobs}
    if rank() == 0:
        write_text(directory / "config.toml", to_toml(config))
        for leftover in directory.glob("rows_rank*.pt"):
            leftover.unlink()
    barrier()
    torch.save(rows, directory / f"rows_rank{rank()}.pt")
    barrier()
    return directory


def replay(directory: str) -> int:
    """`--debug.replay`: makes the kept update again, says where the first bad number is; returns the exit code.

    The configuration is the kept one; options of the command line come on top. The rows of all ranks are dealt to the
    ranks that there are now, so that one process replays what eight did.
    """
    path = Path(directory)
    try:
        files = _kept_rows(path)
        config = load_config(Config, prog="axpo.train", recipe=str(path / "config.toml"))
        source = model_directory(config.model.path)
        check_weights(source)
    except (ValueError, OSError) as error:
        exit_with("axpo.train", error)
    initialise(device())
    learner = make_learner(config, source)
    kept = latest(path / "checkpoint")
    if kept is None:
        exit_with("axpo.train", ValueError(f"debug.replay = {directory!r}: {path / 'checkpoint'} holds no checkpoint"))
    load_checkpoint(kept, learner)
    minibatch = _read_rows(files[rank() :: world_size()])
    watch = Watch(learner, minibatch)
    outcome = "the update is finite here: nothing to find"
    try:
        learner.replay(minibatch)
    except NonFiniteError as error:
        outcome = str(error)
    reports = gather_objects([(rank(), watch.report())])
    if rank() == 0:
        print(f"replay of {path}: {outcome}")
        for number, lines in reports:
            for line in lines:
                print(f"rank {number}: {line}" if world_size() > 1 else line)
    finish()
    return 0 if outcome.startswith("the update is finite") else NON_FINITE


class Watch:
    """Looks at everything that an update computes, in the order in which it does; from the first bad tensor on, blind.

    `report()` names non-finite weights and inputs, then the first non-finite module output of the forward passes or
    gradient of the backward passes.
    """

    def __init__(self, learner: Learner, minibatch: Minibatch):
        self.first: str | None = None
        self.given = [
            found
            for name, parameter in learner.model.named_parameters()
            if (found := _describe(f"weight {name}", _local(parameter)))
        ]
        for index, row in enumerate(minibatch.rows):
            for name in ("old_logprobs", "advantages", "weights"):
                if found := _describe(f"input {name} of row {index}", getattr(row, name)):
                    self.given.append(found)
        for prefix, model in (("", learner.model), ("reference policy: ", learner.reference)):
            for name, module in model.named_modules() if model is not None else ():
                module.register_forward_hook(self._after(prefix + (name or "log-probs and entropies")))

    def report(self) -> list[str]:
        return [*self.given, f"first non-finite tensor: {self.first or 'none of the forward and backward passes'}"]

    def _after(self, name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            for tensor in _tensors(output):
                self._see(f"forward, output of {name}", tensor)
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._see, f"backward, gradient of the output of {name}"))

        return hook

    def _see(self, what: str, tensor: Tensor | None) -> None:
        if self.first is None and tensor is not None:
            self.first = _describe(what, tensor)


def _describe(what: str, tensor: Tensor) -> str | None:
    """None when every number is finite."""
    tensor = tensor.detach()
    if not tensor.is_floating_point() or tensor.isfinite().all():
        return None
    nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return f"{what}: {nan} NaN and {infinite} infinite of {tensor.numel()} numbers, shape {list(tensor.shape)}"


def _tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor of a module's output: a tensor, or tuples, lists and dataclasses of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
    elif hasattr(output, "__dataclass_fields__"):
        for field in fields(output):
            yield from _tensors(getattr(output, field.name))


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _row_state(row: PackedBatch) -> dict[str, Any]:
    """Plain containers, so that a kept row is read without running code from the file."""
    state = {field.name: getattr(row, field.name) for field in fields(row)}
    images = [{field.name: getattr(image, field.name) for field in fields(image)} for image in row.images]
    return state | {"images": images}


def _kept_rows(path: Path) -> list[Path]:
    files = sorted(path.glob("rows_rank*.pt"))
    missing = [name for name in ("config.toml", "checkpoint") if not (path / name).exists()]
    if missing or not files:
        raise ValueError(
            f"debug.replay = {str(path)!r}: not the directory of a kept update, since it has no "
            f"{(missing or ['rows_rank0.pt'])[0]}; give <run.dir>/<run.name>/debug/step_…"
        )
    return files


def _read_rows(files: list[Path]) -> Minibatch:
    parts = [torch.load(file, weights_only=True) for file in files]
    rows = [row for part in parts for row in part["rows"]]
    batches = [PackedBatch(**{**row, "images": tuple(ImageInput(**image) for image in row["images"])}) for row in rows]
    if any(part["old_logprobs"] is None for part in parts):
        return Minibatch(batches)
    return replace(Minibatch(batches), old_logprobs=[old for part in parts for old in part["old_logprobs"]])

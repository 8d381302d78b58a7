"""A run's way through its steps: from a checkpoint on, saving as it goes, to its end or to where it must stop."""

import math
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from axpo.checkpoint import Checkpointer, load_checkpoint
from axpo.checkpoint_record import Progress
from axpo.config import Config, SftConfig
from axpo.distributed import all_reduce, cpu_group, rank, shared_store, world_size
from axpo.heartbeat import Heartbeat
from axpo.learner import Learner
from axpo.rundir import RunDir, fsync
from axpo.stopping import Stop

_STOP, _ASK_S = "axpo/stop", 0.5


class Lifecycle:
    """Stands at the run directory's checkpoint once made; every rank makes the same calls.

    step: the last whole step. consumed: question groups (or teacher trajectories) that it and those before it used.
    """

    def __init__(
        self,
        config: Config | SftConfig,
        directory: RunDir,
        learner: Learner,
        stop: Stop,
        heartbeat: Heartbeat,
    ):
        self._config, self._directory, self._learner = config, directory, learner
        self._stop, self._heartbeat = stop, heartbeat
        self._control = cpu_group(config.run.timeout_s)
        self._checkpoints = Checkpointer(
            directory.checkpoints,
            keep=config.checkpoint.keep,
            identity=directory.identity,
            asynchronous=config.checkpoint.asynchronous,
            timeout_s=config.run.timeout_s,
        )
        self.step, self.consumed = 0, 0
        if directory.checkpoint_step:
            progress = load_checkpoint(directory.checkpoint(directory.checkpoint_step), learner)
            self.step, self.consumed = progress.step, progress.consumed_groups
        self._saved = self.step
        self._told, self._asked = False, -math.inf

    def steps(self) -> Iterator[int]:
        """The steps that are left; each must be ended by `advance`."""
        while self.step < self._config.run.steps:
            self._heartbeat.enter("bookkeeping", self.step + 1)
            yield self.step + 1

    def advance(self, groups: int) -> None:
        """A step is whole: its update is made, its files are written, and it used `groups` groups."""
        self.step, self.consumed = self.step + 1, self.consumed + groups

    @property
    def save_due(self) -> bool:
        every = self._config.checkpoint.every
        return self.step == self._config.run.steps or (every > 0 and self.step % every == 0)

    def save(self) -> None:
        """The checkpoint of the last whole step; metrics.jsonl is made durable first, since its length goes in."""
        length = 0
        if rank() == 0:
            fsync(self._directory.metrics)
            length = self._directory.metrics.stat().st_size
        self._checkpoints.save(self._learner, Progress(self.step, self.consumed, length))
        self._saved = self.step

    def interrupted(self) -> bool:
        """Whether this rank or, as known to about a second, another one was asked to stop; no rank waits for it."""
        if not self._told and world_size() > 1 and time.monotonic() - self._asked > _ASK_S:
            if self._stop.requested():
                shared_store().set(_STOP, "")
            self._told, self._asked = shared_store().check([_STOP]), time.monotonic()
        return self._told or self._stop.requested()

    def stopping(self) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer.

        Raises:
            CheckpointError: a checkpoint could not be written since the last call; on all ranks alike.
        """
        go_on, stop, failed = range(3)
        mine = failed if self._checkpoints.failed else stop if self._stop.requested() else go_on
        most = int(all_reduce(mine, torch.device("cpu"), dist.ReduceOp.MAX, self._control))
        if most == failed:
            self._checkpoints.wait()
        return most != go_on

    def save_and_stop(self) -> None:
        """Saves the last whole step unless it is saved already; rank 0 says where the run stands."""
        self._heartbeat.enter("checkpoint")
        if self.step > self._saved:
            self.save()
        self._checkpoints.wait()
        if rank() == 0:
            why = self._stop.reason or "a signal to another rank"
            print(f"stopped by {why} after step {self.step}; continue with --run.resume", flush=True)

    def wait(self) -> None:
        """Until the last checkpoint is on disk; raises CheckpointError if it could not be written."""
        self._checkpoints.wait()

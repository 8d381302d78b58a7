"""Supervised fine-tuning on the task's teacher: `torchrun -m axpo.sft [recipe] [--section.field value …]`."""

import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from axpo.cli import exit_with, load_config
from axpo.config import SftConfig
from axpo.order import shuffled

if TYPE_CHECKING:
    from axpo.heartbeat import Heartbeat
    from axpo.rundir import RunDir
    from axpo.stopping import Stop
    from axpo.tasks.teacher import Row
    from axpo.trajectory import Trajectory
    from axpo.tree import PackedBatch


def main() -> None:
    config = load_config(SftConfig, prog="axpo.sft", recipe="mini-sft")
    # After the configuration is known to be right: these take seconds to import.
    from axpo import distributed
    from axpo.checkpoint_record import CheckpointError
    from axpo.heartbeat import Heartbeat
    from axpo.paths import model_directory
    from axpo.rundir import RunDirError
    from axpo.sharding import check_replicas
    from axpo.start import open_run
    from axpo.stopping import Stop
    from axpo.tasks import fingerprint, get_task
    from engine.weights import check_weights

    stop = Stop(config.run.time_limit_s)
    try:
        distributed.initialise(distributed.device(), config.run.timeout_s)
        source = model_directory(config.model.path)
        if not config.sft.from_scratch:
            check_weights(source)
        check_replicas(config.train.replicas)
        run = open_run(config, lambda: fingerprint(get_task(config.data.task)))
    except (ValueError, OSError) as error:
        exit_with("axpo.sft", error)
    try:
        with Heartbeat(run.ranks, "axpo.sft") as heartbeat:
            tune(config, source, run, stop, heartbeat)
    except (CheckpointError, RunDirError) as error:
        exit_with("axpo.sft", error)
    distributed.finish()


def tune(config: SftConfig, source: Path, run: "RunDir", stop: "Stop", heartbeat: "Heartbeat") -> None:
    """Runs to `run.steps` from wherever the run directory stands, then exports; or saves when it is asked to stop."""
    import torch

    from axpo.checkpoint import export_policy
    from axpo.distributed import device, rank, world_size
    from axpo.heartbeat import TracedSpans
    from axpo.learner import Learner
    from axpo.lifecycle import Lifecycle
    from axpo.metrics import MetricsLogger
    from axpo.packing import pack_trees

    dataset = TeacherData(source, config, rank(), world_size())
    learner = Learner(
        source,
        dtype=getattr(torch, config.model.dtype),
        device=device(),
        optim=config.optim,
        total_steps=config.run.steps,
        scratch_seed=config.run.seed if config.sft.from_scratch else None,
        train=config.train,
    )
    life = Lifecycle(config, run, learner, stop, heartbeat)
    log = MetricsLogger(
        run,
        steps=config.run.steps,
        rank=rank(),
        tensorboard=config.log.tensorboard,
        console=config.log.console,
        columns=(("loss", "policy/loss", "{:.3f}"), ("s/step", "perf/step_s", "{:.2f}")),
    )
    spans = TracedSpans(heartbeat)
    with log:
        for step in life.steps():
            with spans("data"):
                batches = pack_trees(dataset.batch(step), config.train.micro_batch_tokens, learner.flops)
            with spans("train"):
                metrics = learner.sft_step(batches)
            log.log(step, metrics | spans.metrics())
            life.advance(config.sft.batch_size)
            if life.save_due:
                with spans("checkpoint"):
                    life.save()
            if life.stopping():
                return life.save_and_stop()
    life.wait()
    export_policy(learner, source, run.policy)
    if config.sft.export and rank() == 0:
        for file in run.policy.iterdir():
            shutil.copy2(file, Path(config.sft.export) / file.name)


class TeacherData:
    """The mini task's teacher trajectories as packed rows; example i is the same whatever the number of ranks."""

    def __init__(self, source: Path, config: SftConfig, rank: int, world_size: int):
        from axpo.tasks import get_task
        from engine import Processor

        self.config = config
        self.rank, self.world_size = rank, world_size
        self.task = get_task(config.data.task)
        self.processor = Processor.from_pretrained(source)
        self._tree = cache(self._make_tree)

    def batch(self, step: int) -> list["PackedBatch"]:
        """This rank's share of the examples of step 1, 2, …; an epoch is `sft.examples` of them in a new order."""
        size, count = self.config.sft.batch_size, self.config.sft.examples
        wanted = np.arange((step - 1) * size, step * size)[self.rank :: self.world_size]
        return [self._tree(shuffled(self.config.run.seed, int(position), count)) for position in wanted]

    def _make_tree(self, example: int) -> "PackedBatch":
        from axpo.tasks.teacher import STYLES, sft_row
        from axpo.tree import build_trees, with_labels

        question = self.task.question("train", example % self.task.size("train"))
        rng = np.random.default_rng([self.config.run.seed, example])
        row = sft_row(question, rng, self.processor, STYLES[self.config.sft.style])
        tree = build_trees([self._trajectory(question.id, example, row)], {}, self.processor.image_token_id)[0]
        weight = self.config.sft.image_label_weight
        return with_labels(tree, row.image_labels, weight) if weight else tree

    def _trajectory(self, question_id: str, example: int, row: "Row") -> "Trajectory":
        from axpo.trajectory import PROMPT, SAMPLED, Trajectory

        length = len(row.tokens)
        return Trajectory(
            step=0,
            question_id=question_id,
            group=example,
            id=f"teacher/{example}",
            parent=None,
            fork_token=None,
            prompt_len=row.loss_mask.index(1),
            tokens=row.tokens,
            roles=[SAMPLED if trained else PROMPT for trained in row.loss_mask],
            loss_mask=row.loss_mask,
            logprobs=[None] * length,
            entropies=[None] * length,
            advantages=[0.0] * length,
            reward=1.0,
            status="answered",
            tool_calls=[],
            confidence=None,
            text="",
            images=row.images,
            positions=self.processor.positions(row.tokens, row.images),
        )


if __name__ == "__main__":
    main()

"""A run's state and its bookkeeping: engine, learner, clock, log, evaluations, checkpoints, the end."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType

import torch

from axpo.branch import Limits
from axpo.checkpoint import export_policy
from axpo.config import Config
from axpo.distributed import barrier, device, from_rank_0, gather_objects, rank, world_size
from axpo.evaluate import Evaluation, comparison, evaluate
from axpo.explore import Exploration, explore
from axpo.heartbeat import Heartbeat, TracedSpans
from axpo.inputs import Inputs, make_agent, make_learner
from axpo.learner import NonFiniteError
from axpo.lifecycle import Lifecycle
from axpo.metrics import MetricsLogger
from axpo.order import shuffled
from axpo.replay import keep_update
from axpo.rollout import InterruptedRollouts
from axpo.rundir import RunDir, cannot_write, write_json
from axpo.stopping import Stop
from axpo.tasks import Question
from axpo.telemetry import Telemetry
from axpo.trajectory import SAMPLED, Trajectory
from axpo.weights_sync import push_weights


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step's trajectories of all ranks, without images: `resamples` by the id of their source."""

    groups: list[list[Trajectory]]
    resamples: dict[str, list[Trajectory]]

    @property
    def trajectories(self) -> list[Trajectory]:
        return [t for group in self.groups for t in group] + [t for k in self.resamples.values() for t in k]


class Run:
    """A context manager: made from checked inputs and a run directory, standing at the directory's last checkpoint."""

    def __init__(self, config: Config, inputs: Inputs, directory: RunDir, stop: Stop, heartbeat: Heartbeat):
        self.config, self.inputs, self.directory = config, inputs, directory
        self.log = MetricsLogger(
            directory,
            steps=config.run.steps,
            rank=rank(),
            tensorboard=config.log.tensorboard,
            console=config.log.console,
            wandb=config.log.wandb_project if config.log.wandb else "",
        )
        self.agent = make_agent(config, inputs, load=False)  # the learner brings the weights
        self.learner = make_learner(config, inputs.source)
        self.spans = TracedSpans(heartbeat, torch.cuda.synchronize if device().type == "cuda" else None)
        self.life = Lifecycle(config, directory, self.learner, stop, heartbeat)
        self.agent.interrupted, self.agent.patience_s = self.life.interrupted, config.run.timeout_s
        self.telemetry = Telemetry(device(), self.agent.llm)
        self.push_weights()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self.log.close()
        if isinstance(error, NonFiniteError):
            kept = keep_update(self.directory.debug(self.life.step + 1), self.config, self.learner, error.minibatch)
            raise NonFiniteError(
                f"step {self.life.step + 1}, {error}\nthe update is kept: find the first bad tensor with "
                f"python -m axpo.train --debug.replay {kept}",
                error.minibatch,
            ) from error

    def questions(self, step: int) -> list[tuple[int, Question]]:
        """This rank's (group number, question)s of step 1, 2, …: the training split, shuffled anew every epoch."""
        count, size = self.config.rollout.questions_per_step, self.inputs.task.size("train")
        ahead = (step - self.life.step - 1) * count  # 0, or with rollout.overlap the groups of the step in training
        drawn = range(self.life.consumed + ahead, self.life.consumed + ahead + count)
        order = [shuffled(self.config.run.seed, position, size) for position in drawn]
        mine = list(enumerate(order))[rank() :: world_size()]  # what others ask is not read here
        return [(group, self.inputs.task.question("train", index)) for group, index in mine]

    def explore(self, step: int) -> Exploration:
        """This rank's share of the step's questions, rolled out and resampled."""
        rollout = self.config.rollout
        limits = Limits(
            max_turns=rollout.max_turns,
            max_new_tokens=rollout.max_new_tokens,
            max_tokens=rollout.max_tokens,
            max_observation_tokens=rollout.max_observation_tokens,
            max_images=rollout.max_images,
            tool_timeout_s=rollout.tool_timeout_s,
            temperature=rollout.temperature,
        )
        total = rollout.questions_per_step
        return explore(self.agent, step, self.questions(step), total, limits, self.config.algo, self.config.run.seed)

    def unless_stopped(self, explore: Callable[[int], Exploration], step: int) -> Exploration | None:
        """What `explore` returns; None on every rank when any was asked to stop, before it or in it."""
        explored = None
        with suppress(InterruptedRollouts):
            explored = explore(step)
        return None if self.life.stopping() else explored

    def evaluates_after(self, step: int) -> bool:
        """Whether the engine is wanted for something else than step + 1."""
        every = self.config.eval.every
        return step == self.config.run.steps or bool(every and step % every == 0)

    def release_kv(self) -> None:
        """The engine gives the memory of its KV cache to the training that follows, by `rollout.sleep_in_training`."""
        if self.config.rollout.sleep_in_training == "always" or (
            self.config.rollout.sleep_in_training == "auto" and device().type == "cuda"
        ):
            self.agent.llm.sleep()

    def push_weights(self) -> None:
        """The trained weights become the engine's, which has its KV cache again after this."""
        self.synced = push_weights(self.learner.model, self.agent.llm.model, alias=not self.config.rollout.overlap)
        self.agent.llm.weights_updated()
        self.agent.llm.wake_up()

    def gather(self, groups: list[list[Trajectory]], resamples: dict[str, list[Trajectory]]) -> StepRecord:
        """The step's trajectories of every rank, in question order, on every rank."""
        light = [[_light(trajectory) for trajectory in group] for group in groups]
        children = {source: [_light(trajectory) for trajectory in branches] for source, branches in resamples.items()}
        everyone = gather_objects([(light, children)])
        ordered = sorted((group for some, _ in everyone for group in some), key=lambda group: group[0].group)
        return StepRecord(ordered, {source: branches for _, some in everyone for source, branches in some.items()})

    def finish_step(self, step: int, record: StepRecord, metrics: dict[str, float | None]) -> None:
        """Trajectories, then metrics, then the checkpoint: a resume drops what lies behind its checkpoint."""
        with self.spans("log"):
            if rank() == 0:
                self.directory.write_trajectories(step, record.trajectories)
        seconds = self.spans.metrics()
        sampled = sum(_new_tokens(trajectory) for trajectory in record.trajectories)
        metrics["perf/rollout_tokens_per_s"] = sampled / (metrics["perf/explore_s"] or math.inf)
        metrics["perf/train_tokens_per_s"] = (metrics["pack/tokens"] or 0) / seconds["perf/train_s"]
        metrics |= self.telemetry.metrics(seconds, metrics["pack/flops"] or 0.0)
        metrics["pack/idle_s"] = (metrics["pack/idle_fraction"] or 0) * seconds["perf/train_s"]
        try:
            self.log.log(step, metrics | self.synced.metrics() | seconds)
        except OSError as error:
            raise cannot_write(self.directory.metrics, error) from None
        self.life.advance(self.config.rollout.questions_per_step)
        if self.life.save_due:
            with self.spans("checkpoint"):
                self.life.save()
        if self._evaluation_due() and step < self.config.run.steps:
            with self.spans("evaluation"):
                self._evaluate()

    def evaluate_before(self) -> None:
        """Evaluates the policy that the run begins with; on a resume, that of the checkpoint if a kill came before."""
        if self._evaluation_due() and not from_rank_0(self.directory.evaluation(self.life.step).exists):
            self.log.print(f"evaluating step {self.life.step} on {self.config.eval.questions} held-out questions …")
            with self.spans("evaluation"):
                self._evaluate()

    def finish_run(self) -> None:
        """Exports the policy, evaluates it, shows before and after, and writes the report."""
        self.life.wait()
        with self.spans("finish"):
            export_policy(self.learner, self.inputs.source, self.directory.policy)
            evaluated = self.life.step == 0 and from_rank_0(self.directory.evaluation(0).exists)
            if self.config.eval.questions and not evaluated:
                self.log.print("evaluating the trained policy …")
                if not self._evaluate():
                    return self.life.save_and_stop()
            if rank() == 0:
                from axpo.report import write_report

                if self.config.eval.questions:
                    self.log.print(comparison(self._before_and_after()))
                report = write_report(self.directory.path, self.config.log.trees_in_report)
                self.log.print(f"policy  {self.directory.policy}\nreport  {report}")
            barrier()

    def _evaluation_due(self) -> bool:
        """Whether this step, 0 for the policy before the run, is one to evaluate after."""
        every = self.config.eval.every
        return self.config.eval.questions > 0 and (self.life.step == 0 or (every > 0 and self.life.step % every == 0))

    def _evaluate(self) -> bool:
        """Writes evaluation/step_000010.json of the policy of this step; nothing and False when asked to stop."""
        result = evaluate(self.agent, self.inputs.task, self.config, self.life.step)
        if result is not None and rank() == 0:
            write_json(self.directory.evaluation(self.life.step), result.to_json())
        barrier()
        return result is not None

    def _before_and_after(self) -> Sequence[tuple[str, Evaluation]]:
        steps = {"before": 0, "after": self.life.step} if self.life.step else {"without training": 0}
        files = {name: self.directory.evaluation(step) for name, step in steps.items()}
        return [(name, Evaluation.from_json(json.loads(file.read_text()))) for name, file in files.items()]


def _light(trajectory: Trajectory) -> Trajectory:
    return replace(trajectory, images=[], positions=None)


def _new_tokens(trajectory: Trajectory) -> int:
    """Sampled tokens that are the trajectory's own, behind its fork."""
    return trajectory.roles[trajectory.fork_token or 0 :].count(SAMPLED)

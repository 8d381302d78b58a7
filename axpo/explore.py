"""A step's rollouts and resamples, none waiting for another (PAPER.md, "AXPO" 1–5).

A group is graded when its last rollout ends. Its prefixes are resampled as soon as no unfinished group can take their
place in the budget, while stragglers still run; KV that can no longer be forked is given back at once.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

from axpo.branch import Branch, Limits
from axpo.config import Algo
from axpo.distributed import Bulletin, rank, world_size
from axpo.resample import Candidate, PrefixBoard, find_candidates, prefix_budget, select_prefixes
from axpo.rollout import Agent
from axpo.tasks import Question
from axpo.trajectory import Trajectory


@dataclass(slots=True)
class Exploration:
    """This rank's share of a step, all of it ended.

    groups: the rollouts of each question, in question order. resamples: by the id of their source.
    budget: continuations that the step could take, over all ranks. seconds: until the last rollout ended, then with
    resamples alone. early: resamples that began before that. tool_wait_s: of it, with nothing to decode.
    """

    groups: list[list[Trajectory]]
    resamples: dict[str, list[Trajectory]] = field(default_factory=dict)
    budget: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)
    early: int = 0
    tool_wait_s: float = 0.0


def explore(
    agent: Agent,
    step: int,
    questions: Sequence[tuple[int, Question]],
    total: int,
    limits: Limits,
    algo: Algo,
    seed: int,
) -> Exploration:
    """Rolls out `algo.group_size` times on this rank's (group number, question)s of the step's `total`, and resamples.

    No collective runs here. Every rank calls it, and the ranks share the budget.
    """
    prefixes = prefix_budget(algo.resampling_ratio, total, algo.group_size, algo.resamples_per_prefix)
    select = partial(select_prefixes, rank=algo.rank, question_order=algo.question_order, seed=seed, step=step)
    bulletin = _bulletin(step) if prefixes and world_size() > 1 else None
    board = PrefixBoard(total, algo.group_size, prefixes, select, bulletin)
    begun, waited = time.perf_counter(), agent.tool_wait_s
    branches = agent.start(step, questions, algo.group_size, limits)
    followup = _Followup(agent, step, branches, board, algo.resamples_per_prefix)
    agent.advance([branch for group in branches for branch in group], limits, followup)
    ended = time.perf_counter()
    last = followup.last_rollout or ended
    return Exploration(
        groups=[followup.groups[group] for group, _ in questions],
        resamples=followup.resamples(),
        budget=prefixes * algo.resamples_per_prefix,
        seconds=(last - begun, ended - last),
        early=followup.early,
        tool_wait_s=agent.tool_wait_s - waited,
    )


def _bulletin(step: int) -> Bulletin:
    if rank() == 0:
        Bulletin(f"step_{step - 2}").clear()  # every rank has trained on step - 2's groups since
    return Bulletin(f"step_{step}")


class _Followup:
    """Grades groups as they end and forks the prefixes that the board has selected."""

    def __init__(self, agent: Agent, step: int, groups: Sequence[Sequence[Branch]], board: PrefixBoard, count: int):
        self.agent, self.step, self.board, self.count = agent, step, board, count
        self.groups: dict[int, list[Trajectory]] = {}
        self.early, self.last_rollout = 0, 0.0
        self._running = {group[0].group: list(group) for group in groups}
        self._left = {group: len(branches) for group, branches in self._running.items()}
        self._sources: dict[str, Branch] = {}  # ended, and their KV is held while a resample may need it
        self._forked: dict[Candidate, list[str]] = {}  # the ids of its continuations
        self._made: dict[str, Trajectory] = {}

    def ended(self, branch: Branch) -> Sequence[Branch]:
        if branch.parent is not None:
            self._made[branch.id] = self.agent.trajectory(branch, self.step)
            self.agent.close([branch])
            return ()
        self._left[branch.group] -= 1
        if self._left[branch.group]:
            return ()
        branches = self._running.pop(branch.group)
        group = [self.agent.trajectory(member, self.step) for member in branches]
        self.groups[branch.group] = group
        self._sources |= {member.id: member for member in branches}
        if not self._running:
            self.last_rollout = time.perf_counter()
        self.board.finish(branch.group, find_candidates([group]))
        return self._fork_selected()

    def poll(self) -> Sequence[Branch] | None:
        if not (self._running or self._sources):
            return None
        return self._fork_selected() if self.board.poll() else ()

    def resamples(self) -> dict[str, list[Trajectory]]:
        """By source, in question order then rollout order."""
        order = sorted(self._forked, key=lambda c: (c.group, c.rollout))
        return {c.source: [self._made[name] for name in self._forked[c]] for c in order}

    def _fork_selected(self) -> list[Branch]:
        new = []
        chosen = [c for c in self.board.selected if c.source in self._sources]
        for c in sorted(chosen, key=lambda c: (c.group, c.rollout)):
            branches = self.agent.fork(self.step, self._sources[c.source], c.fork_token, self.count)
            self._forked[c] = [branch.id for branch in branches]
            new += branches
        self.early += len(new) if self._running else 0
        still_open = {c.source for c in self.board.open}
        gone = [source for source in self._sources if source not in still_open]
        self.agent.close(self._sources.pop(source) for source in gone)
        return new


class StepAhead:
    """The next step's exploration, in a thread of its own while this one trains (one-step off-policy), or on demand.

    A context manager: leaving it waits for the thread. Who began a step must leave the engine alone until `result`.
    """

    def __init__(self, explore: Callable[[int], Exploration]):
        self._explore = explore
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self._begun: dict[int, Future[Exploration]] = {}

    def __enter__(self) -> "StepAhead":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._thread.shutdown(wait=True)

    @property
    def running(self) -> bool:
        return bool(self._begun)

    def begin(self, step: int) -> None:
        self._begun[step] = self._thread.submit(self._explore, step)

    def result(self, step: int) -> Exploration:
        """Of the step that was begun, or of one that is explored now."""
        begun = self._begun.pop(step, None)
        return self._explore(step) if begun is None else begun.result()

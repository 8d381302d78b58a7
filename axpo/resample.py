"""Which prefixes are resampled: trigger, candidates, ranking and the breadth-first budget (PAPER.md, "AXPO" 1–4)."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import numpy as np

from axpo.forks import ForkAt, find_fork
from axpo.trajectory import Trajectory

if TYPE_CHECKING:
    from axpo.distributed import Bulletin

Trigger = Literal["tool", "no_tool", "always"]
Rank = Literal["confidence", "entropy", "random", "entropy_rise"]
QuestionOrder = Literal["rank", "data"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A fixed prefix that may be resampled; light, so that data-parallel ranks can gather all of them.

    group: the question's order in the step, over all ranks. rollout: the source's order in its group.
    fork_token: tokens that are kept; under AXPO one past the opening <tool_call> tag of the first call. confidence:
    mean exp(logprob) of the call, entropy: its mean exact entropy in nats; rise: see `axpo.forks.Fork`.
    """

    group: int
    rollout: int
    source: str
    fork_token: int
    confidence: float
    entropy: float
    rise: float = 0.0


@dataclass(frozen=True, slots=True)
class Rule:
    """Which rollouts may be resampled (`trigger`), and from where on; the rest are arguments of `find_fork`.

    tool: the tool-using rollouts of a question, when all of them are wrong. no_tool: those without a call, likewise.
    always: every rollout.
    """

    trigger: Trigger = "tool"
    fork_at: ForkAt = "call"
    think_end: int = -1
    window: int = 20


AXPO = Rule()


def find_candidates(groups: Sequence[Sequence[Trajectory]], rule: Rule = AXPO) -> list[Candidate]:
    """Every rollout of a triggered subgroup that can be forked, in question order then rollout order."""
    found = []
    for group in groups:
        chosen = {rollout.id for rollout in triggered(group, rule.trigger)}
        found += [c for i, r in enumerate(group) if r.id in chosen and (c := candidate(r, i, rule)) is not None]
    return sorted(found, key=lambda c: (c.group, c.rollout))


def triggered(group: Sequence[Trajectory], trigger: Trigger) -> list[Trajectory]:
    """The rollouts of the group that the trigger takes, none when it does not fire."""
    if trigger == "always":
        return list(group)
    subgroup = tool_using(group) if trigger == "tool" else without_tool(group)
    return subgroup if all_wrong(subgroup) else []


def tool_using(group: Sequence[Trajectory]) -> list[Trajectory]:
    """The group's rollouts with at least one attempted call; a malformed or unclosed call is an attempt."""
    return [rollout for rollout in group if rollout.used_tool]


def without_tool(group: Sequence[Trajectory]) -> list[Trajectory]:
    return [rollout for rollout in group if not rollout.used_tool]


def all_wrong(rollouts: Sequence[Trajectory]) -> bool:
    """Non-empty, and none is correct: on the tool-using subgroup this is the paper's trigger."""
    return bool(rollouts) and not any(rollout.correct for rollout in rollouts)


def candidate(rollout: Trajectory, index: int, rule: Rule = AXPO) -> Candidate | None:
    """The rollout's prefix as a candidate; None where it cannot be forked, without a call for one."""
    fork = find_fork(rollout, rule.fork_at, rule.think_end, rule.window)
    if fork is None:
        return None
    return Candidate(rollout.group, index, rollout.id, fork.tokens, fork.confidence, fork.entropy, fork.rise)


def prefix_budget(ratio: float, questions: int, group_size: int, resamples_per_prefix: int) -> int:
    """⌊r·B·N/K⌋ prefixes; exact for a decimal ratio such as 0.29."""
    return int(Fraction(str(ratio)) * questions * group_size // resamples_per_prefix)


def select_prefixes(
    candidates: Sequence[Candidate],
    budget: int,
    *,
    rank: Rank = "confidence",
    question_order: QuestionOrder = "rank",
    seed: int = 0,
    step: int = 0,
) -> list[Candidate]:
    """At most `budget` candidates, breadth-first: every question gets its best before any gets a second.

    Within a question, prefixes come by rank: ascending confidence, descending entropy or rise, or at random; ties by
    rollout order. Questions come by the rank of their best prefix, ties by question order, or in question order
    ("data"). The result depends on the set of candidates alone, so all ranks that know it select the same prefixes.
    """
    scores = {c: (_score(c, rank, seed, step), c.group, c.rollout) for c in candidates}
    questions: dict[int, list[Candidate]] = {}
    for c in sorted(scores, key=scores.__getitem__):
        questions.setdefault(c.group, []).append(c)
    by_rank = list(questions)  # in the order of their best prefixes
    queue = [questions[group] for group in (by_rank if question_order == "rank" else sorted(questions))]
    rounds = range(max(map(len, queue), default=0))
    return [question[i] for i in rounds for question in queue if i < len(question)][: max(budget, 0)]


def _score(c: Candidate, rank: Rank, seed: int, step: int) -> float:
    """Lower is resampled sooner."""
    if c.source == _ANY:
        return -math.inf
    if rank == "confidence":
        return c.confidence
    if rank == "entropy":
        return -c.entropy
    if rank == "random":
        return random.Random(f"{seed}/{step}/{c.group}/{c.rollout}").random()
    if rank == "entropy_rise":
        return -c.rise
    raise ValueError(f"algo.rank = {rank!r}: choose confidence, entropy, random or entropy_rise")


_ANY = ""
"""The source of a prefix that an unfinished group may still turn out to have; nothing ranks before it."""


class PrefixBoard:
    """Decides a step's prefixes as early as the budget rule allows, over all ranks and without a collective.

    Groups finish in any order, on any rank. A candidate is *selected* once `select_prefixes` takes it even if each
    unfinished group has as many candidates as rollouts and all of them rank first. It is *open* while it is not
    selected, but would be if those groups had none. So no decision depends on which group was faster, and when all
    have finished, the selected ones are `select_prefixes` of all candidates.

    Args:
        groups: question groups of the step, over all ranks, numbered from 0.
        group_size: rollouts of a group.
        budget: prefixes of the step, over all ranks.
        select: `select_prefixes` with the run's rank, question order, seed and step bound.
        bulletin: brings the other ranks' groups; None with one rank.
    """

    def __init__(
        self,
        groups: int,
        group_size: int,
        budget: int,
        select: Callable[[Sequence[Candidate], int], list[Candidate]],
        bulletin: "Bulletin | None" = None,
    ):
        self.budget = budget
        self.candidates: list[Candidate] = []
        self.selected: set[Candidate] = set()
        self.open: set[Candidate] = set()
        self._group_size = group_size
        self._unfinished = set(range(groups))
        self._select = select
        self._bulletin = bulletin

    def finish(self, group: int, candidates: Sequence[Candidate]) -> None:
        """A group of this rank has ended, with these candidates (none if it is not triggered)."""
        self._add(group, candidates)
        if self._bulletin is not None:
            self._bulletin.post((group, list(candidates)))
        self._decide()

    def poll(self) -> bool:
        """Reads what other ranks have finished since the last call; True if there was something."""
        news = self._bulletin.read() if self._bulletin is not None else []
        for group, candidates in news:
            self._add(group, candidates)
        if news:
            self._decide()
        return bool(news)

    def _add(self, group: int, candidates: Sequence[Candidate]) -> None:
        self._unfinished.remove(group)
        self.candidates += candidates

    def _decide(self) -> None:
        if self.budget == 0 or not self.candidates:
            return
        unknown = [Candidate(g, i, _ANY, 0, 0.0, 0.0) for g in self._unfinished for i in range(self._group_size)]
        self.selected = {c for c in self._select([*self.candidates, *unknown], self.budget) if c.source != _ANY}
        self.open = set(self._select(self.candidates, self.budget)) - self.selected


def rank_correlation(candidates: Sequence[Candidate]) -> tuple[float, float] | None:
    """(Pearson, Spearman) of mean entropy against negated confidence (the paper: 0.843, 0.835).

    None below two candidates or when either quantity is constant.
    """
    entropy = np.array([c.entropy for c in candidates])
    uncertainty = np.array([-c.confidence for c in candidates])
    if len(candidates) < 2 or np.ptp(entropy) == 0 or np.ptp(uncertainty) == 0:
        return None
    return _pearson(entropy, uncertainty), _pearson(_average_ranks(entropy), _average_ranks(uncertainty))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def _average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; tied values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]

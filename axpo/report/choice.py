"""Chooses the questions that the report draws as trees: spread over the run, some restored by resampling, some not."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from axpo.report.data import Run, read_trajectories
from axpo.resample import Candidate, candidate
from axpo.trajectory import Trajectory

RESTORED, NOT_RESTORED, PLAIN = "restored", "not restored", "not resampled"
_SCANS = 8  # trajectory files read at least, for the figure of failed calls
_TRIES = 3  # files read at most to find one tree
_MOST_CALLS = 1200  # points of that figure

T = TypeVar("T")


@dataclass(slots=True)
class Group:
    """What is remembered of a question's rollouts and resamples after its step was read."""

    step: int
    file: Path
    question_id: str
    number: int
    right_with_tool: list[bool] = field(default_factory=list)
    right_without: list[bool] = field(default_factory=list)
    resamples: dict[str, list[tuple[bool, str, bool]]] = field(default_factory=dict)
    """By source: whether each is right, the call that it made, whether that could be run."""

    @property
    def outcome(self) -> str:
        if not self.resamples:
            return PLAIN
        return RESTORED if any(right for ks in self.resamples.values() for right, _, _ in ks) else NOT_RESTORED

    @property
    def all_wrong(self) -> bool:
        return bool(self.right_with_tool) and not any(self.right_with_tool)

    @property
    def interest(self) -> float:
        """How much there is to see: different calls, right beside wrong, few sources, calls that a tool could run."""
        every = [item for ks in self.resamples.values() for item in ks]
        if not every:
            outcomes = {*self.right_with_tool} if self.right_with_tool else set()
            return len(outcomes) + 0.5 * len({*self.right_without}) + 0.5 * bool(self.right_with_tool)
        distinct = sum(len({call for _, call, _ in ks}) for ks in self.resamples.values()) / len(self.resamples)
        mixed = len({right for right, _, _ in every}) == 2
        runnable = sum(ok for _, _, ok in every) / len(every)
        return distinct + 2 * mixed + 2 * runnable + len({*self.right_without}) - max(0, len(self.resamples) - 2)


def choose(run: Run, count: int) -> tuple[list[Group], list[Candidate]]:
    """(at most `count` questions in the order of their steps, first calls of all-wrong subgroups in the steps read)."""
    scans: dict[int, tuple[list[Group], list[Candidate]]] = {}
    files = run.trajectories
    chosen: list[Group] = []
    for index, window in enumerate(_windows(files, count)):
        wanted = (RESTORED, NOT_RESTORED)[index % 2]
        late = index == count - 1
        options: list[Group] = []
        for step, file in _likely(run, window[::-1] if late else window, wanted)[:_TRIES]:
            groups, _ = scans.setdefault(step, scans.get(step) or scan(step, file))
            options += [group for group in groups if group not in chosen]
            if any(group.outcome == wanted for group in options):
                break
        if options:
            chosen.append(max(options, key=lambda g: (g.outcome == wanted, g.outcome != PLAIN, g.interest)))
    for step, file in spread(files, _SCANS):
        if len(scans) >= _SCANS:
            break
        scans.setdefault(step, scans.get(step) or scan(step, file))
    calls = [call for step in sorted(scans) for call in scans[step][1]]
    return sorted(chosen, key=lambda g: (g.step, g.number)), spread(calls, _MOST_CALLS)


def scan(step: int, file: Path) -> tuple[list[Group], list[Candidate]]:
    """The groups of a step's file, and the first calls of those whose tool-using rollouts are all wrong."""
    groups: dict[tuple[str, int], Group] = {}
    calls: list[tuple[Group, Candidate]] = []
    for trajectory in read_trajectories(file):
        key = (trajectory.question_id, trajectory.group)
        group = groups.setdefault(key, Group(step, file, *key))
        if trajectory.parent is not None:
            group.resamples.setdefault(trajectory.parent, []).append((trajectory.correct, *_call(trajectory)))
        elif not trajectory.used_tool:
            group.right_without.append(trajectory.correct)
        else:
            group.right_with_tool.append(trajectory.correct)
            if (found := _candidate(trajectory)) is not None:
                calls.append((group, found))
    return list(groups.values()), [found for group, found in calls if group.all_wrong]


def _call(trajectory: Trajectory) -> tuple[str, bool]:
    call = trajectory.first_call
    if call is None or call.arguments is None:
        return trajectory.text, False
    return json.dumps([call.name, call.arguments], sort_keys=True), call.ok


def _candidate(trajectory: Trajectory) -> Candidate | None:
    try:
        return candidate(trajectory, 0)
    except (ValueError, OverflowError):
        return None


def _likely(run: Run, window: Sequence[tuple[int, Path]], wanted: str) -> list[tuple[int, Path]]:
    """The window's files, those first whose metrics say that there is such a question, or that any was resampled."""
    logged = {record["step"]: record for record in run.steps}

    def order(item: tuple[int, Path]) -> tuple[bool, bool]:
        record = logged.get(item[0], {})
        prefixes, rate = record.get("resample/prefixes") or 0, record.get("resample/restore_rate")
        found = prefixes > 0 and rate is not None and (rate > 0 if wanted == RESTORED else rate < 1)
        return not found, not prefixes

    return sorted(window, key=order)


def _windows(files: Sequence[tuple[int, Path]], count: int) -> list[Sequence[tuple[int, Path]]]:
    """`count` consecutive parts; with fewer files than that, some are parts more than once."""
    if not files or count < 1:
        return []
    edges = [index * len(files) // count for index in range(count + 1)]
    return [files[low : max(high, low + 1)] for low, high in pairwise(edges)]


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced, both ends included."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]

"""The before/after table of the report: held-out measures with their 95 % intervals, and paired changes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from axpo.bootstrap import interval, question_counts


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share (or a difference of two) with its 95 % interval; the ends are None where there is nothing to go by."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def certain(self) -> bool:
        """The interval of a difference leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, slots=True)
class Row:
    """One measure, before and after training. `change` is paired over the questions, None without both."""

    label: str
    meaning: str
    before: Estimate | None
    after: Estimate | None
    change: Estimate | None


def evaluation_rows(evaluations: Sequence[dict[str, Any]]) -> list[Row]:
    """One row a measure, from the first and the last evaluation; with a single one `before` is None."""
    if not evaluations:
        return []
    after = evaluations[-1]
    before = evaluations[0] if len(evaluations) > 1 else None
    k = after["summary"].get("samples") or _samples(after["summary"])
    measures = [
        ("pass@1", "Pass@1", "mean share of right answers"),
        (f"pass@{k}", f"Pass@{k}", f"questions with a right answer among {k}"),
        ("tool/rate", "Tool use", "answers with at least one call"),
        ("tool/accuracy", "Right with a tool", "of the answers with a call"),
        ("no_tool/accuracy", "Right without", "of the answers without a call"),
    ]
    rows = []
    for index, (name, label, meaning) in enumerate(measures):
        if index == 1 and k in (None, 1):
            continue
        first, last = _estimate(before, name), _estimate(after, name)
        if first or last:
            rows.append(Row(label, meaning, first, last, _change(before, after, name, first, last)))
    return rows


def _samples(summary: dict[str, Any]) -> int | None:
    counts = [int(name[5:]) for name in summary if name.startswith("pass@") and name[5:].isdigit()]
    return max(counts, default=None)


def _estimate(evaluation: dict[str, Any] | None, name: str) -> Estimate | None:
    """The summary's numbers; an interval that it does not hold comes from a bootstrap over its questions."""
    if evaluation is None or (value := _number(evaluation["summary"].get(name))) is None:
        return None
    low, high = (_number(evaluation["summary"].get(f"{name}_{end}")) for end in ("low", "high"))
    if low is None or high is None:
        low, high = interval(_draws(evaluation, name, evaluation))
    return Estimate(value, low, high)


def _change(
    before: dict[str, Any] | None,
    after: dict[str, Any],
    name: str,
    first: Estimate | None,
    last: Estimate | None,
) -> Estimate | None:
    """Both evaluations drawn with the same questions, so that what makes a question hard cancels out."""
    if before is None or first is None or last is None:
        return None
    value = last.value - first.value
    draws = [_draws(evaluation, name, after) for evaluation in (before, after)]
    if len(before.get("questions", ())) != len(after.get("questions", ())) or not all(d.size for d in draws):
        return Estimate(value)
    return Estimate(value, *interval(draws[1] - draws[0]))


def _draws(evaluation: dict[str, Any], name: str, order: dict[str, Any]) -> np.ndarray:
    """The measure on bootstrap samples of the questions, taken in the order of evaluation `order`; [] without them.

    The same number of questions gives the same samples, which is what pairs two evaluations.
    """
    try:
        questions = {question["id"]: question for question in evaluation["questions"]}
        rows = [questions[question["id"]] for question in order["questions"]]
        parts = np.array([_parts(name, row["rewards"], row["used_tool"]) for row in rows], dtype=float)
    except (KeyError, TypeError, ValueError):
        return np.array([])
    if not len(parts):
        return np.array([])
    right, answers = (question_counts(len(parts)) @ parts).T
    with np.errstate(invalid="ignore", divide="ignore"):
        return right / answers


def _parts(name: str, rewards: Sequence[float], used_tool: Sequence[bool]) -> tuple[float, float]:
    """A question's share of the measure's numerator and denominator."""
    right = [reward > 0 for reward in rewards]
    if name == "pass@1":
        return sum(right), len(right)
    if name.startswith("pass@"):
        return any(right), 1
    if name == "tool/rate":
        return sum(used_tool), len(used_tool)
    wanted = [bool(used) == (name == "tool/accuracy") for used in used_tool]
    return sum(r for r, w in zip(right, wanted, strict=True) if w), sum(wanted)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)

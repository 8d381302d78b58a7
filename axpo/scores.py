"""What a benchmark's samples add up to: unbiased Pass@k, its spread over repeats, tool use, and the table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that any of `k` samples drawn from `samples`, of which `right` are right, is right.

    Unbiased for samples >= k (Chen et al., arXiv 2107.03374).

    Raises:
        ValueError: k is not between 1 and `samples`, or `right` not between 0 and `samples`.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"Pass@{k} of {samples} samples, {right} of them right: needs 1 <= k and right <= samples")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


@dataclass(frozen=True, slots=True)
class Scores:
    """A benchmark's results.

    pass_1, pass_k: (mean, standard deviation over repeats or None for a single one). score: mean of the graders' own
    scores, which F1 and ANLS grade between 0 and 1. tool_accuracy, no_tool_accuracy: of samples with and without a
    call, None where there is none. errors: samples whose answer could not be compared.
    """

    questions: int
    samples: int
    repeats: int
    k: int
    pass_1: tuple[float, float | None]
    pass_k: tuple[float, float | None]
    score: float
    tool_rate: float
    tool_accuracy: float | None
    no_tool_accuracy: float | None
    errors: int


def scores(lines: Iterable[Mapping[str, Any]], k: int) -> Scores:
    """Of the sample lines of a benchmark (axpo.benchmarks writes them); every question has them all."""
    lines = list(lines)
    hits: dict[int, dict[int, list[float]]] = {}
    by_tool: dict[bool, list[float]] = {True: [], False: []}
    for line in lines:
        hits.setdefault(line["repeat"], {}).setdefault(line["doc_id"], []).append(line["hit"])
        by_tool[line["used_tool"]].append(line["hit"])
    counts = [[(len(some), round(sum(some))) for some in questions.values()] for questions in hits.values()]
    return Scores(
        questions=max(len(questions) for questions in hits.values()),
        samples=counts[0][0][0],
        repeats=len(hits),
        k=k,
        pass_1=_spread([fmean(right / n for n, right in one) for one in counts]),
        pass_k=_spread([fmean(pass_at_k(n, right, k) for n, right in one) for one in counts]),
        score=fmean(line["score"] for line in lines),
        tool_rate=fmean(line["used_tool"] for line in lines),
        tool_accuracy=_mean(by_tool[True]),
        no_tool_accuracy=_mean(by_tool[False]),
        errors=sum(line["error"] is not None for line in lines),
    )


def scores_table(results: Mapping[str, Scores], model: str) -> "Table":
    """One row a benchmark, then their average: Pass@1 and Pass@k in per cent, ± over repeats, tool use and accuracy."""
    from axpo.metrics import table

    first = next(iter(results.values()))
    rows = [
        [
            name,
            str(one.questions),
            _percent(one.pass_1),
            _percent(one.pass_k),
            f"{one.tool_rate:.1%}",
            _share(one.tool_accuracy),
            _share(one.no_tool_accuracy),
        ]
        for name, one in results.items()
    ]
    if len(results) > 1:
        means = [fmean(part(one) for one in results.values()) for part in (_pass_1, _pass_k, _tool_rate)]
        rows.append(["average", "", *(f"{100 * mean:.1f}" for mean in means[:2]), f"{means[2]:.1%}", "", ""])
    title = f"{model}: {first.samples} samples a question, {first.repeats} times"
    return table(title, ["", "questions", "Pass@1", f"Pass@{first.k}", "tool use", "with tool", "without"], rows)


def _pass_1(one: Scores) -> float:
    return one.pass_1[0]


def _pass_k(one: Scores) -> float:
    return one.pass_k[0]


def _tool_rate(one: Scores) -> float:
    return one.tool_rate


def _spread(values: Sequence[float]) -> tuple[float, float | None]:
    return fmean(values), stdev(values) if len(values) > 1 else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _percent(value: tuple[float, float | None]) -> str:
    mean, deviation = value
    return f"{100 * mean:.1f}" if deviation is None else f"{100 * mean:.1f} ± {100 * deviation:.1f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"

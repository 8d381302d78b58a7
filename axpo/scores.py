"""What samples of benchmarks add up to: unbiased Pass@k and its spread over repeats, tool use, averages by family."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean, stdev
from typing import Any

from axpo.sheet import Sheet

MALFORMED = "malformed"
"""What stands for the tool of a call that could not be read."""

SUMMARY = "summary.json"
"""Of an evaluation's folder: the scores of its benchmarks, there when all are whole."""


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
class ToolUse:
    """rate: share of the samples that call the tool. accuracy: of these."""

    rate: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Scores:
    """A benchmark's results.

    pass_1, pass_k: of each repeat. score: mean of the graders' own scores, which F1 and ANLS grade between 0 and 1.
    tool_accuracy, no_tool_accuracy: of samples with and without a call, None where there is none. tools: by name; a
    call that could not be read counts as "malformed". errors: samples whose answer could not be compared.
    """

    family: str
    questions: int
    samples: int
    repeats: int
    k: int
    pass_1: tuple[float, ...]
    pass_k: tuple[float, ...]
    score: float
    tool_rate: float
    tool_accuracy: float | None
    no_tool_accuracy: float | None
    tools: dict[str, ToolUse]
    errors: int


@dataclass(frozen=True, slots=True)
class Average:
    """Means over benchmarks, each counting once: pass_1, pass_k of each repeat."""

    benchmarks: int
    pass_1: tuple[float, ...]
    pass_k: tuple[float, ...]
    tool_rate: float


def scores(lines: Iterable[Mapping[str, Any]], k: int, family: str) -> Scores:
    """Of the sample lines of a benchmark (axpo.benchmarks writes them); every question has them all."""
    lines = list(lines)
    hits: dict[int, dict[int, list[float]]] = {}
    by_tool: dict[bool, list[float]] = {True: [], False: []}
    tools: dict[str, list[float]] = {}
    for line in lines:
        hits.setdefault(line["repeat"], {}).setdefault(line["doc_id"], []).append(line["hit"])
        by_tool[line["used_tool"]].append(line["hit"])
        for name in called(line):
            tools.setdefault(name, []).append(line["hit"])
    counts = [[(len(some), round(sum(some))) for some in questions.values()] for questions in hits.values()]
    return Scores(
        family=family,
        questions=max(len(questions) for questions in hits.values()),
        samples=counts[0][0][0],
        repeats=len(hits),
        k=k,
        pass_1=tuple(fmean(right / n for n, right in one) for one in counts),
        pass_k=tuple(fmean(pass_at_k(n, right, k) for n, right in one) for one in counts),
        score=fmean(line["score"] for line in lines),
        tool_rate=fmean(line["used_tool"] for line in lines),
        tool_accuracy=_mean(by_tool[True]),
        no_tool_accuracy=_mean(by_tool[False]),
        tools={name: ToolUse(len(some) / len(lines), fmean(some)) for name, some in sorted(tools.items())},
        errors=sum(line["error"] is not None for line in lines),
    )


def called(line: Mapping[str, Any]) -> set[str]:
    """The tools that a sample called."""
    return {name or MALFORMED for name in line["tools"]}


def families(results: Mapping[str, Scores]) -> dict[str, dict[str, Scores]]:
    """The benchmarks of each family, families in the order of their first one."""
    grouped: dict[str, dict[str, Scores]] = {}
    for name, one in results.items():
        grouped.setdefault(one.family, {})[name] = one
    return grouped


def average(results: Iterable[Scores]) -> Average:
    """Over benchmarks that were repeated equally often."""
    results = list(results)
    return Average(
        benchmarks=len(results),
        pass_1=tuple(map(fmean, zip(*(one.pass_1 for one in results), strict=True))),
        pass_k=tuple(map(fmean, zip(*(one.pass_k for one in results), strict=True))),
        tool_rate=fmean(one.tool_rate for one in results),
    )


def scores_sheet(results: Mapping[str, Scores], model: str) -> Sheet:
    """A row a family, its benchmarks below it, then the average over all of these: in per cent, ± over repeats."""
    rows = []
    for family, members in families(results).items():
        alone = list(members) == [family]
        if not alone:
            rows.append([family, "", *_average_cells(average(members.values()))])
        for name, one in members.items():
            cells = [percent(one.pass_1), percent(one.pass_k), share(one.tool_rate)]
            accuracies = [share(one.tool_accuracy), share(one.no_tool_accuracy)]
            rows.append([name if alone else f"  {name}", str(one.questions), *cells, *accuracies])
    if len(results) > 1:
        rows.append(["average", "", *_average_cells(average(results.values()))])
    first = next(iter(results.values()))
    title = f"{model}: {first.samples} samples a question, {first.repeats} times"
    return Sheet(title, ["", "questions", "Pass@1", f"Pass@{first.k}", "tool use", "with tool", "without"], rows)


def tools_sheet(results: Mapping[str, Scores]) -> Sheet:
    """Of each benchmark and tool: the share of samples that call it, and how many of these are right."""
    names = sorted({name for one in results.values() for name in one.tools})
    rows = [[name, *(_tool_cell(one.tools.get(tool)) for tool in names)] for name, one in results.items()]
    return Sheet("samples that call a tool / right ones of them", ["", *names], rows)


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, None of a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def percent(values: Sequence[float]) -> str:
    """Mean in per cent, ± the standard deviation."""
    mean, deviation = spread(values)
    return f"{100 * mean:.1f}" if deviation is None else f"{100 * mean:.1f} ± {100 * deviation:.1f}"


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _average_cells(one: Average) -> list[str]:
    return [percent(one.pass_1), percent(one.pass_k), share(one.tool_rate), "", ""]


def _tool_cell(use: ToolUse | None) -> str:
    return "–" if use is None else f"{use.rate:.1%} / {use.accuracy:.1%}"


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None

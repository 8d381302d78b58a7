"""Checkpoints side by side: `python -m axpo.compare NAME=FOLDER NAME=FOLDER … [--out FOLDER]`.

Each FOLDER is one that axpo.evaluate has written. Only what all of them have counts: benchmarks, questions, repeats.
Prints the tables; with --out also comparison.md, comparison.json and comparison.png.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from axpo.bootstrap import interval, question_counts
from axpo.cli import exit_with
from axpo.rundir import write_json, write_text
from axpo.scores import (
    MALFORMED,
    SUMMARY,
    Average,
    Scores,
    average,
    called,
    families,
    pass_at_k,
    percent,
    scores,
    share,
)
from axpo.sheet import Sheet, print_sheets

Lines = dict[str, list[dict[str, Any]]]
"""The sample lines of an evaluation by benchmark."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more the second model gets right, with its 95 % interval, paired over the questions."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class SharedTool:
    """A tool on the questions where both models called it: the means of their right samples among those with a call."""

    questions: int
    first: float
    second: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two models on the same questions. pass_1, pass_k: of the average over benchmarks. tools: by name."""

    pass_1: Difference
    pass_k: Difference
    tools: dict[str, SharedTool]


@dataclass(frozen=True, slots=True)
class Comparison:
    """results: scores by model and benchmark. pairs: every two models, in their order. left_out: what not all have."""

    k: int
    results: dict[str, dict[str, Scores]]
    pairs: dict[tuple[str, str], Pair]
    left_out: list[str]

    def averages(self, model: str) -> dict[str, Average]:
        """Of each family, then "average" over all benchmarks."""
        grouped = families(self.results[model])
        means = {family: average(members.values()) for family, members in grouped.items()}
        return means | {"average": average(self.results[model].values())}

    def to_json(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "models": {
                model: {
                    "averages": {name: asdict(one) for name, one in self.averages(model).items()},
                    "benchmarks": {name: asdict(one) for name, one in results.items()},
                }
                for model, results in self.results.items()
            },
            "pairs": [{"first": a, "second": b, **asdict(pair)} for (a, b), pair in self.pairs.items()],
            "left_out": self.left_out,
        }


def compare(folders: Mapping[str, Path], k: int = 0) -> Comparison:
    """Scores the evaluations in `folders`, by model. k: of Pass@k; 0: the smallest number of samples.

    Raises:
        ValueError: no finished evaluation in a folder, no benchmark or question in common, or k is too large.
    """
    read = {model: _read(folder) for model, folder in folders.items()}
    lines, left_out = _common({model: one for model, (one, _) in read.items()})
    _, kept = next(iter(read.values()))
    made: dict[str, dict[str, Scores]] = {}
    smallest = min(_samples(some) for own in lines.values() for some in own.values())
    if k > smallest:
        raise ValueError(f"--k {k}: Pass@k needs as many samples, and an evaluation has {smallest} a question")
    for model, own in lines.items():
        made[model] = {name: scores(some, k or smallest, kept[name]) for name, some in own.items()}
    pairs = {(a, b): _pair(lines[a], lines[b], k or smallest) for a, b in combinations(lines, 2)}
    return Comparison(k or smallest, made, pairs, left_out)


def sheets(comparison: Comparison) -> list[Sheet]:
    """By family, by benchmark where these are not the same, tool use, and every two models."""
    k, models = comparison.k, list(comparison.results)
    means = {model: comparison.averages(model) for model in models}
    first = comparison.results[models[0]]
    count = sum(one.questions for one in first.values())
    repeats = next(iter(first.values())).repeats
    title = f"Pass@1 / Pass@{k} by family, {len(first)} benchmarks, {count} questions, {repeats} times"
    by_family = [[model, *map(_passes, means[model].values())] for model in models]
    by_benchmark = [[model, *map(_passes, comparison.results[model].values())] for model in models]
    shown = [Sheet(title, ["", *means[models[0]]], by_family)]
    if list(first) != list(families(first)):
        shown.append(Sheet(f"Pass@1 / Pass@{k} by benchmark", ["", *first], by_benchmark))
    shown.append(_use_sheet(comparison))
    return shown + ([_pairs_sheet(comparison), _shared_sheet(comparison)] if comparison.pairs else [])


def _use_sheet(comparison: Comparison) -> Sheet:
    tools = sorted({tool for own in comparison.results.values() for one in own.values() for tool in one.tools})
    rows = []
    for model, own in comparison.results.items():
        use = [fmean(one.tools[tool].rate if tool in one.tools else 0.0 for one in own.values()) for tool in tools]
        rates = [comparison.averages(model)["average"].tool_rate, *use]
        right = [
            _known([one.tool_accuracy for one in own.values()]),
            _known([one.no_tool_accuracy for one in own.values()]),
        ]
        rows.append([model, share(rates[0]), *map(share, right), *map(share, rates[1:])])
    columns = ["", "tool use", "right with", "right without", *(f"calls {tool}" for tool in tools)]
    return Sheet("tool use: means over benchmarks", columns, rows)


def _pairs_sheet(comparison: Comparison) -> Sheet:
    rows = [[f"{a} → {b}", _change(pair.pass_1), _change(pair.pass_k)] for (a, b), pair in comparison.pairs.items()]
    title = "change of the average in points [95 % interval over questions]"
    return Sheet(title, ["", "Pass@1", f"Pass@{comparison.k}"], rows)


def _shared_sheet(comparison: Comparison) -> Sheet:
    rows = [
        [f"{a} → {b}", tool, str(one.questions), share(one.first), share(one.second)]
        for (a, b), pair in comparison.pairs.items()
        for tool, one in pair.tools.items()
    ]
    title = "right samples with a call, on questions where both called the tool"
    return Sheet(title, ["", "tool", "questions", "first", "second"], rows)


def _passes(one: Scores | Average) -> str:
    return f"{percent(one.pass_1)} / {percent(one.pass_k)}"


def _change(one: Difference) -> str:
    ends = "" if one.low is None or one.high is None else f" [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
    return f"{100 * one.value:+.1f}{ends}"


def _known(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def _read(folder: Path) -> tuple[Lines, dict[str, str]]:
    """The lines of a finished evaluation by benchmark, and each one's family."""
    try:
        summary = json.loads((folder / SUMMARY).read_text())["benchmarks"]
        lines = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in summary}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: no finished evaluation of axpo.evaluate ({error})") from None
    return lines, {name: one["family"] for name, one in summary.items()}


def _common(read: dict[str, Lines]) -> tuple[dict[str, Lines], list[str]]:
    """The lines of the benchmarks, questions and repeats that all models have, and what is left out."""
    first = next(iter(read.values()))
    names = [name for name in first if all(name in own for own in read.values())]
    if not names:
        raise ValueError("no benchmark that all have: " + "; ".join(f"{m} has {', '.join(o)}" for m, o in read.items()))
    left_out = [f"{model}: {name}" for model, own in read.items() for name in own if name not in names]
    repeats = min(len({line["repeat"] for line in own[name]}) for own in read.values() for name in names)
    kept: dict[str, Lines] = {model: {} for model in read}
    for name in names:
        asked = [{line["index"] for line in own[name] if line["repeat"] < repeats} for own in read.values()]
        shared = set.intersection(*asked)
        if not shared:
            raise ValueError(f"{name}: no question that all were asked")
        for model, own in read.items():
            kept[model][name] = [line for line in own[name] if line["repeat"] < repeats and line["index"] in shared]
            if left := len(own[name]) - len(kept[model][name]):
                left_out.append(f"{model}: {left} samples of {name}")
    return kept, left_out


def _samples(lines: list[dict[str, Any]]) -> int:
    return 1 + max(line["sample"] for line in lines)


def _pair(first: Lines, second: Lines, k: int) -> Pair:
    return Pair(_difference(first, second, 1), _difference(first, second, k), _shared_tools(first, second))


def _difference(first: Lines, second: Lines, k: int) -> Difference:
    """Of the averages over benchmarks; each benchmark's questions are resampled on their own."""
    value, draws = 0.0, np.zeros(1)
    for name in first:
        before, after = _by_question(first[name], k), _by_question(second[name], k)
        changes = np.array([after[index] - before[index] for index in before])
        value += changes.mean() / len(first)
        draws = draws + question_counts(len(changes)) @ changes / len(changes) / len(first)
    return Difference(float(value), *interval(draws))


def _by_question(lines: list[dict[str, Any]], k: int) -> dict[str, float]:
    """Pass@k of each question, the mean over repeats."""
    hits: dict[str, dict[int, list[int]]] = {}
    for line in lines:
        hits.setdefault(line["index"], {}).setdefault(line["repeat"], []).append(line["hit"])
    return {
        index: fmean(pass_at_k(len(some), sum(some), k) for some in repeats.values()) for index, repeats in hits.items()
    }


def _shared_tools(first: Lines, second: Lines) -> dict[str, SharedTool]:
    """Of the tools, less calls that could not be read."""
    own = _by_tool(first), _by_tool(second)
    found = {}
    for tool in sorted((own[0].keys() & own[1].keys()) - {MALFORMED}):
        if shared := own[0][tool].keys() & own[1][tool].keys():
            means = [fmean(fmean(some[tool][question]) for question in shared) for some in own]
            found[tool] = SharedTool(len(shared), *means)
    return found


def _by_tool(lines: Lines) -> dict[str, dict[tuple[str, str], list[int]]]:
    """Hits of the samples that called a tool, by (benchmark, question)."""
    found: dict[str, dict[tuple[str, str], list[int]]] = {}
    for name, some in lines.items():
        for line in some:
            for tool in called(line):
                found.setdefault(tool, {}).setdefault((name, line["index"]), []).append(line["hit"])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="axpo.compare", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER", help="a model's name and its evaluation's folder")
    parser.add_argument("--out", type=Path, help="folder for comparison.md, .json and .png")
    parser.add_argument("--k", type=int, default=0, help="of Pass@k; default: the smallest number of samples")
    args = parser.parse_args(argv)
    try:
        named = [entry.partition("=") for entry in args.folders]
        if wrong := [name for name, equals, folder in named if not (name and equals and folder)]:
            raise ValueError(f"{wrong[0]!r}: must be NAME=FOLDER")
        folders = {name: Path(folder) for name, _, folder in named}
        if len(folders) < len(named):
            raise ValueError("two folders have one name")
        if args.k < 0:
            raise ValueError(f"--k {args.k}: must be 1 or more, or 0 for the smallest number of samples")
        if args.out is not None:
            _make(args.out)
        show(compare(folders, args.k), args.out)
    except ValueError as error:
        exit_with("axpo.compare", error)


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be made: {error.strerror}") from None


def show(comparison: Comparison, out: Path | None) -> None:
    """Prints the tables and writes them to `out`."""
    made = sheets(comparison)
    print_sheets(made)
    for name in comparison.left_out:
        print(f"left out, since not all have it: {name}")
    if out is None:
        return
    from axpo.compare_picture import draw

    write_text(out / "comparison.md", "\n".join(sheet.markdown() for sheet in made))
    write_json(out / "comparison.json", comparison.to_json())
    draw(comparison, out / "comparison.png")
    print(f"comparison {out}")


if __name__ == "__main__":
    main()

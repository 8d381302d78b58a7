"""Two evaluations, tool by tool: `python -m axpo.compare FOLDER FOLDER` on results of axpo.evaluate (`eval.out`).

Two models use a tool on different questions, so that their accuracies with it say little about how well they use it.
Here each tool is compared on the questions on which both called it (PAPER.md, "Diagnostics").
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from axpo.cli import exit_with

if TYPE_CHECKING:
    from rich.table import Table

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shared:
    """A tool on the questions on which both models called it in some sample.

    accuracy: of each model's samples on them that called the tool. first_only, second_only: questions on which one did.
    """

    questions: int
    accuracy: tuple[float, float] | None
    first_only: int
    second_only: int


def shared_tools(first: Iterable[Line], second: Iterable[Line]) -> dict[str, Shared]:
    """By tool, of the sample lines of two evaluations of the same questions (docs/evaluation.md)."""
    one, other = _hits(first), _hits(second)
    compared = {}
    for tool in sorted(one.keys() | other.keys()):
        mine, theirs = one.get(tool, {}), other.get(tool, {})
        both = sorted(mine.keys() & theirs.keys())
        accuracies = [fmean(hit for question in both for hit in hits[question]) for hits in (mine, theirs) if both]
        compared[tool] = Shared(
            questions=len(both),
            accuracy=(accuracies[0], accuracies[1]) if both else None,
            first_only=len(mine) - len(both),
            second_only=len(theirs) - len(both),
        )
    return compared


def _hits(lines: Iterable[Line]) -> dict[str, dict[tuple[str, str], list[float]]]:
    """Tool → question → hit of each sample that called it."""
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for line in lines:
        for tool in {name for name in line["tools"] if name is not None}:
            question = (line["benchmark"], line["index"])
            found.setdefault(tool, {}).setdefault(question, []).append(float(line["hit"]))
    return found


def read_results(folder: Path) -> dict[str, list[Line]]:
    """The sample lines of each whole benchmark of a folder; ValueError when there is none."""
    files = [file for file in sorted(folder.glob("*.jsonl")) if not file.stem.rpartition(".")[2].isdigit()]
    if not files:
        raise ValueError(f"{folder}: no whole benchmark there; give the eval.out of axpo.evaluate")
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def comparison_table(tools: Mapping[str, Shared]) -> "Table":
    from axpo.metrics import table

    rows = []
    for tool, shared in tools.items():
        shown = ["–", "–", "–"]
        if shared.accuracy is not None:
            first, second = shared.accuracy
            shown = [f"{first:.1%}", f"{second:.1%}", f"{100 * (second - first):+.1f}"]
        rows.append([tool, str(shared.questions), *shown, str(shared.first_only), str(shared.second_only)])
    title = "accuracy with each tool, on the questions on which both called it"
    columns = ["", "questions", "first", "second", "points", "first alone", "second alone"]
    return table(title, columns, rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m axpo.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs=2, type=Path, metavar="FOLDER", help="eval.out of two evaluations")
    folders: list[Path] = parser.parse_args(argv).folders
    try:
        first, second = map(read_results, folders)
        common = sorted(first.keys() & second.keys())
        if not common:
            raise ValueError(
                f"{folders[0]} has {', '.join(first)}, {folders[1]} has {', '.join(second)}: none in common"
            )
    except (ValueError, OSError) as error:
        exit_with("axpo.compare", error)
    from rich.console import Console

    lines = [[line for name in common for line in results[name]] for results in (first, second)]
    Console().print(comparison_table(shared_tools(*lines)))
    print(f"first {folders[0]}, second {folders[1]}, benchmarks: {', '.join(common)}")


if __name__ == "__main__":
    main()

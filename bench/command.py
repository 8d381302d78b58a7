"""What benchmarks share on their command line and at their end: options, the clock, tables in Markdown, the JSON."""

import argparse
import json
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")


def write_json(file: Path | None, report: object) -> None:
    """Where --json asked for it."""
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")


def settings(args: argparse.Namespace) -> dict[str, object]:
    """The options as they go into the JSON."""
    return {name: value for name, value in vars(args).items() if name != "json"}


def add_rounds(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Options of a benchmark whose systems take turns; `rounds` by default."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        default="wall",
        choices=("wall", "cpu"),
        help="cpu: processor time of all threads over their number, for a machine that others use as well",
    )
    parser.add_argument("--rounds", type=int, default=rounds)


def clock(args: argparse.Namespace) -> Callable[[], float]:
    """Seconds, by --clock."""
    if args.clock == "wall":
        return time.perf_counter
    return lambda: time.process_time() / args.threads


def row(cells: Sequence[object]) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(columns: Sequence[str], text: Collection[int] = (0,)) -> str:
    """The lines above a table's rows; the columns of numbers, all but those in `text`, are set to the right."""
    return f"{row(columns)}\n|{'|'.join('---' if i in text else '--:' for i in range(len(columns)))}|"

"""Rows: `python -m axpo.data check FILE…`, `show FILE [N]`, `convert`, `export`, `filter`, `list`."""

import argparse
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from axpo.cli import exit_with
from axpo.tasks import SPLITS, Split


def main() -> None:
    parser = argparse.ArgumentParser(prog="axpo.data", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    check = verbs.add_parser("check", help="read every row, decode every image; 0: all right, 2: what is wrong")
    check.add_argument("files", nargs="+", type=Path, help=".jsonl, .parquet or .arrow files, or folders of them")
    show = verbs.add_parser("show", help="one row as the model is asked it")
    show.add_argument("file", type=Path)
    show.add_argument("index", nargs="?", type=int, default=0)
    convert = verbs.add_parser("convert", help="a published data set as rows")
    convert.add_argument("--from", dest="name", required=True, help="name of the data set; `list` shows them")
    convert.add_argument("--skip", action="store_true", help="leave wrong records out and count them")
    convert.add_argument("source", type=Path, help="its file, or the folder of its shards")
    convert.add_argument("out", type=Path, help="the .parquet (images inside) or .jsonl file to write")
    keep = verbs.add_parser("filter", help="rows for RL: not solved always by the student, nor never by the teacher")
    keep.add_argument("--student", type=Path, required=True, help="folder of the student's axpo.collect")
    keep.add_argument("--teacher", type=Path, required=True, help="folder of the teacher's axpo.collect")
    keep.add_argument("--add", type=Path, action="append", default=[], help="rows that are kept besides (repeatable)")
    keep.add_argument("source", type=Path, help="the rows that both were asked")
    keep.add_argument("out", type=Path, help="the .parquet or .jsonl file to write")
    export = verbs.add_parser("export", help="questions of an embedded task, or of rows, as a file of rows")
    export.add_argument("--split", choices=SPLITS, default="train", help="of an embedded task (default: train)")
    export.add_argument("--count", type=int, default=0, help="first questions that are written; 0: all")
    export.add_argument("source", help="name of the task, or a file or folder of rows")
    export.add_argument("out", type=Path, help="the .parquet or .jsonl file to write")
    verbs.add_parser("list", help="the data sets that `convert` knows")
    args = parser.parse_args()
    try:
        if args.verb == "check":
            for file in args.files:
                check_file(file)
        elif args.verb == "show":
            show_row(args.file, args.index)
        elif args.verb == "convert":
            convert_file(args.name, args.source, args.out, skip=args.skip)
        elif args.verb == "filter":
            filter_file(args.student, args.teacher, args.source, args.out, args.add)
        elif args.verb == "export":
            export_file(args.source, args.out, split=args.split, count=args.count)
        else:
            list_adapters()
    except (ValueError, OSError, IndexError) as error:
        exit_with("axpo.data", error)


def check_file(path: Path) -> None:
    """Prints what a file or folder of rows holds; DataError when a row is wrong."""
    from axpo.data import Rows

    rows = Rows(path)
    kinds = rows.check()
    counts = [f"{count} by {kind}" for kind, count in sorted(kinds.items())]
    if conversations := len(rows) - kinds.total():
        counts.append(f"{conversations} conversations")
    print(f"{path}: {len(rows)} rows are right: {', '.join(counts)}")


def show_row(path: Path, index: int) -> None:
    from axpo.data import Rows

    row = Rows(path)[index]
    sizes = ", ".join(f"{image.width}x{image.height}" for image in row.images())
    print(f"id: {row.id}\nimages: {sizes or 'none'}")
    for message in row.messages:
        print(f"{message['role']}: {message['content']}")
    print(f"rubric: {row.rubric}\nmeta: {row.meta}")


def convert_file(name: str, source: Path, out: Path, *, skip: bool) -> None:
    """Writes the rows and prints their number; DataError names the first wrong record."""
    from axpo.data.adapters import Conversion
    from axpo.data.write import write_rows

    conversion = Conversion(name, source, skip=skip)
    count = write_rows(conversion, out)
    print(f"{out}: {count} rows of {name}" + (f", {len(conversion.skipped)} left out" if skip else ""))
    for problem in conversion.skipped[:10]:
        print(f"left out: {problem}", file=sys.stderr)
    published = conversion.adapter.rows
    if published is not None and count != published:
        print(f"note: the published split has {published} rows ({conversion.adapter.source})", file=sys.stderr)


def filter_file(student: Path, teacher: Path, source: Path, out: Path, added: Sequence[Path] = ()) -> None:
    """Writes the rows that RL can learn from, then those of `added`, and prints why others are left out.

    Raises:
        ValueError: a row was not asked, or none is left.
    """
    from axpo.collect import read_outcomes
    from axpo.data import Rows
    from axpo.data.select import RlQuestions
    from axpo.data.write import write_rows

    rewards = [{one["id"]: one["rewards"] for one in read_outcomes(folder)} for folder in (student, teacher)]
    chosen = RlQuestions(Rows(source), *rewards)
    extra = [Rows(file) for file in added]
    count = write_rows(chain(chosen, (row.record() for rows in extra for row in rows)), out)
    more = sum(map(len, extra))
    print(
        f"{out}: {count - more} of {chosen.seen} rows{f' and {more} others' if more else ''}; left out: "
        f"{chosen.solved} that the student always solves, {chosen.failed} that the teacher never does"
    )
    if not count:
        out.unlink()
        raise ValueError(f"{source}: no row is left to learn from")


def export_file(source: str, out: Path, *, split: Split = "train", count: int = 0) -> None:
    """Writes the questions as rows, images inside, and prints their number; ValueError when there are none such."""
    from axpo.data import Row
    from axpo.data.write import write_rows
    from axpo.tasks import get_task, task_names

    if count < 0:
        raise ValueError(f"--count {count}: must be 1 or more, or 0 for all")
    if source in task_names():
        task = get_task(source)
    elif Path(source).exists():
        task, split = get_task("jsonl", path=source, check_rows=1), "train"
    else:
        raise ValueError(f"{source}: no such file, nor an embedded task: {', '.join(task_names())}")
    wanted = range(min(count or task.size(split), task.size(split)))
    written = write_rows((Row.of(task.question(split, index)).record() for index in wanted), out)
    print(f"{out}: {written} of {task.size(split)} questions of {source}")


def list_adapters() -> None:
    from axpo.data.adapters import ADAPTERS

    for name, adapter in ADAPTERS.items():
        print(f"{name:18} {adapter.source}" + (f" ({adapter.rows} rows)" if adapter.rows else ""))


if __name__ == "__main__":
    main()

"""The rows of a file or of a folder of shards, in one numbering, read when they are asked for."""

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from axpo.data.rows import FIELDS, Row, check_pictures, parse_row
from axpo.data.tables import TableError, find_files, open_table
from axpo.grading import Kind
from axpo.images import encoded

_SHOWN = 10


class DataError(ValueError):
    """Rows that cannot be used: one line for each problem, naming file, line, row and field."""


class Rows:
    """Rows by number. Memory holds where they are, and not the rows.

    path: a .jsonl, .parquet or .arrow file, or a folder of them.

    Raises:
        DataError: a file is missing, cut short, of an unknown format, or has no row.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._tables = [open_table(file) for file in find_files(path)]
        except TableError as error:
            raise DataError(str(error)) from None
        if empty := [table.path for table in self._tables if not len(table)]:
            raise DataError(f"{empty[0]}: no rows; each line is a JSON object with {', '.join(FIELDS[:4])}")
        self._ends = [0, *accumulate(len(table) for table in self._tables)]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        """Row `index`; IndexError when there is none, DataError when it is wrong."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, none with index {index}")
        row, problems = self._read(index)
        if row is None:
            raise DataError(report(problems))
        return row

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def find(self, row_id: str) -> Row:
        """The row with this id, whatever the others are; LookupError when there is none."""
        for index in range(len(self)):
            row, _ = self._read(index)
            if row is not None and row.id == row_id:
                return row
        raise LookupError(f"{self.path} has no row with this id")

    def check(self, count: int = 0, *, conversations: bool | None = None) -> Counter[Kind]:
        """Reads `count` rows (evenly spread; 0: all), decodes their images, and counts the graders that questions need.

        conversations: True wants only them, False only questions, None takes both.

        Raises:
            DataError: with the first problems of all those found.
        """
        kinds: Counter[Kind] = Counter()
        seen: dict[str, int] = {}
        problems: list[str] = []
        total = len(self)
        chosen = range(total) if not 0 < count < total else sorted({i * total // count for i in range(count)})
        for index in chosen:
            row, wrong = self._read(index)
            problems += wrong
            if row is None:
                continue
            place = self.place(index)
            if seen.setdefault(row.id, index) != index:
                first = self.place(seen[row.id])
                same_file = first.rpartition(":")[0] == place.rpartition(":")[0]
                where = first.rpartition(":")[2].strip() if same_file else first
                where = f"line {where}" if where.isdigit() else where
                problems.append(f"{place}: id = {row.id!r}: {where} has the same id")
            if conversations is not None and row.is_conversation != conversations:
                ends, wanted = ("assistant", "user") if row.is_conversation else ("user", "assistant")
                problems.append(f"{place}: row {row.id!r}: messages: end with {ends!r}; here they must with {wanted!r}")
            problems += [f"{place}: row {row.id!r}: {problem}" for problem in check_pictures(row)]
            if row.rubric is not None and not row.is_conversation:
                kinds[row.rubric.kind] += 1
        if problems:
            raise DataError(report(problems))
        return kinds

    def content_hash(self) -> str:
        """SHA-256 of every row and every image as it is stored; reads all of them. A wrong row counts as what is wrong.

        In which files the rows lie, and where, does not matter.
        """
        digest = hashlib.sha256()
        for index in range(len(self)):
            row, problems = self._read(index)
            if row is None:
                digest.update(json.dumps(problems).encode())
                continue
            digest.update(json.dumps([row.id, row.messages, repr(row.rubric), len(row.pictures)]).encode())
            for picture in row.pictures:
                digest.update(hashlib.sha256(encoded(picture)).digest())
        return digest.hexdigest()

    def place(self, index: int) -> str:
        """File and line (or row) of row `index`."""
        table = bisect_right(self._ends, index) - 1
        return self._tables[table].place(index - self._ends[table])

    def _read(self, index: int) -> tuple[Row | None, list[str]]:
        number = bisect_right(self._ends, index) - 1
        table = self._tables[number]
        try:
            record = table.record(index - self._ends[number])
        except TableError as error:
            return None, [f"{self.place(index)}: {error}"]
        row, problems = parse_row(record, table.path.parent)
        return row, [f"{self.place(index)}: {problem}" for problem in problems]


def report(problems: list[str]) -> str:
    """The first problems, a line each, and how many more there are."""
    more = [f"… and {len(problems) - _SHOWN} more problems"] if len(problems) > _SHOWN else []
    return "\n".join(problems[:_SHOWN] + more)

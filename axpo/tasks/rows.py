"""Your own questions: rows of files (docs/data.md), as training takes them."""

from pathlib import Path

from axpo.data import Rows
from axpo.grading import Kind
from axpo.tasks import SPLITS, Question, Split


class RowsTask:
    """Questions from files, read and their images decoded when they are asked for, so that a large set needs no memory.

    path, heldout_path: a .jsonl, .parquet or .arrow file, or a folder of them; empty: a split without questions.
    check_rows: rows of each, evenly spread, that are checked in full here; 0: all.

    Raises:
        DataError: what is wrong, by file, row and field.
    """

    name = "jsonl"

    def __init__(self, path: str | Path, heldout_path: str | Path = "", check_rows: int = 0):
        files = dict(zip(SPLITS, (path, heldout_path), strict=True))
        self._rows = {split: Rows(file) for split, file in files.items() if str(file)}
        checked = [rows.check(check_rows, conversations=False) for rows in self._rows.values()]
        self._kinds = set[Kind]().union(*checked)

    def size(self, split: Split) -> int:
        return len(self._rows[split]) if split in self._rows else 0

    def kinds(self) -> set[Kind]:
        """The graders of the rows that were checked."""
        return self._kinds

    def content_hash(self, split: Split) -> str:
        """Of every row and every image, in the order of the rows; where the files lie does not matter."""
        return self._rows[split].content_hash()

    def question(self, split: Split, index: int) -> Question:
        """Question `index`; DataError when its row was not checked and is wrong."""
        if not 0 <= index < self.size(split):
            raise IndexError(f"jsonl/{split} has {self.size(split)} questions, none with index {index}")
        return self._rows[split][index].question()

"""Which questions RL can learn from (PAPER.md, "Pipeline" 3)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from axpo.data.dataset import Rows

Rewards = Mapping[str, Sequence[float]]


class RlQuestions:
    """Records of the rows, less those that the student solves every time and those that the teacher fails every time.

    student, teacher: rewards of the samples by question id. Iterating counts `seen`, `solved` and `failed`.

    Raises:
        ValueError: a row was not asked to both.
    """

    def __init__(self, rows: Rows, student: Rewards, teacher: Rewards):
        self._rows, self._student, self._teacher = rows, student, teacher
        self.seen = self.solved = self.failed = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, row in enumerate(self._rows):
            self.seen += 1
            for who, rewards in (("student", self._student), ("teacher", self._teacher)):
                if row.id not in rewards:
                    place = self._rows.place(index)
                    raise ValueError(f"{place}: row {row.id!r} is not in the outcomes of the {who}; collect them on it")
            if all(self._student[row.id]):
                self.solved += 1
            elif not any(self._teacher[row.id]):
                self.failed += 1
            else:
                yield row.record()

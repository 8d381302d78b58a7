"""The paper's three families as embedded tasks: perception, reasoning, search, and all of them mixed."""

import hashlib
from dataclasses import replace

from axpo.grading import Kind
from axpo.tasks import Question, Split, Task
from axpo.tasks.mini import MiniTask
from axpo.tasks.reasoning import ReasoningTask
from axpo.tasks.search import SearchTask

TOOLS = ("image_zoom_in", "python", "tavily-search")


class PerceptionTask(MiniTask):
    """The mini task as one of the suite's families."""

    name = "perception"

    def question(self, split: Split, index: int) -> Question:
        asked = super().question(split, index)
        tile = asked.meta["tiles"][asked.meta["target"]]
        return replace(asked, meta={"family": "perception", "easy": tile["large"], **asked.meta})


class SuiteTask:
    """Questions of the three families in turn: question 3 i + f is question i of family f, with its id and its meta."""

    name = "suite"

    def __init__(self) -> None:
        self._families: tuple[Task, ...] = (PerceptionTask(), ReasoningTask(), SearchTask())

    def size(self, split: Split) -> int:
        return len(self._families) * min(family.size(split) for family in self._families)

    def kinds(self) -> set[Kind]:
        return set[Kind]().union(*(family.kinds() for family in self._families))

    def question(self, split: Split, index: int) -> Question:
        if not 0 <= index < self.size(split):
            raise IndexError(f"{self.name}/{split} has questions 0 to {self.size(split) - 1}, not {index}")
        number, family = divmod(index, len(self._families))
        return self._families[family].question(split, number)

    def content_hash(self, split: Split) -> str:
        parts = [family.content_hash(split) for family in self._families]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

"""Tasks: where questions come from. `get_task("mini")` is the embedded one, "jsonl" your own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from PIL import Image

from axpo.grading.rubric import Kind, Rubric
from axpo.images import check_image

Split = Literal["train", "heldout"]
NO_RUBRIC = Rubric(("-",))
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True)
class Question:
    """One question as the agent loop takes it.

    messages: chat messages; an image is a part {"type": "image"}, text a part {"type": "text", "text": …}.
    images: one PIL image for every image part, in order. answer: the right one, as it is shown.
    rubric: how answers are compared with it; by default they must be the same.
    """

    id: str
    messages: list[dict[str, Any]]
    images: list[Image.Image]
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)
    rubric: Rubric = NO_RUBRIC

    def __post_init__(self) -> None:
        if not isinstance(self.answer, str) or not self.answer.strip():
            raise ValueError(f"question {self.id!r}: answer is {self.answer!r}; it must be a string that is not empty")
        if self.rubric is NO_RUBRIC:
            object.__setattr__(self, "rubric", Rubric((self.answer,)))
        if not self.messages or self.messages[-1].get("role") != "user":
            raise ValueError(f"question {self.id!r}: messages must end with a message of role 'user'")
        contents = [message["content"] for message in self.messages if isinstance(message["content"], list)]
        parts = sum(part.get("type") == "image" for content in contents for part in content)
        if parts != len(self.images):
            raise ValueError(f"question {self.id!r}: {parts} image parts in messages, but {len(self.images)} images")
        for index, image in enumerate(self.images):
            check_image(image, f"question {self.id!r}: image {index}")

    @property
    def text(self) -> str:
        """What the user asks, without the images."""
        content = self.messages[-1]["content"]
        if isinstance(content, str):
            return content
        return "\n".join(part["text"] for part in content if part.get("type") == "text")


class Task(Protocol):
    """A deterministic source of questions: `question` depends on its arguments alone."""

    @property
    def name(self) -> str: ...

    def size(self, split: Split) -> int:
        """Number of questions of a split."""
        ...

    def kinds(self) -> set[Kind]:
        """The graders that its questions need."""
        ...

    def question(self, split: Split, index: int) -> Question:
        """Question `index` of `split`; IndexError or ValueError when there is none."""
        ...

    def content_hash(self, split: Split) -> str:
        """SHA-256 of all that the questions of `split` are made of, images included, in their order."""
        ...


def fingerprint(task: Task) -> dict[str, Any]:
    """Name, number and content of the questions that are trained on: a resume goes on only with the same."""
    return {"task": task.name, "questions": task.size("train"), "sha256": task.content_hash("train")}


def get_task(name: str, **options: Any) -> Task:
    """The task called `name`; `options` go to its constructor.

    Raises:
        ValueError: no such task (the message lists those there are).
    """
    if name not in _TASKS:
        raise ValueError(f"unknown task {name!r}; there is: {', '.join(sorted(_TASKS))}")
    return _TASKS[name](**options)


def task_names() -> list[str]:
    """The embedded tasks: those that need no file."""
    return [name for name in _TASKS if name != "jsonl"]


def _mini(**options: Any) -> Task:
    from axpo.tasks.mini import MiniTask

    return MiniTask(**options)


def _perception(**options: Any) -> Task:
    from axpo.tasks.suite import PerceptionTask

    return PerceptionTask(**options)


def _reasoning(**options: Any) -> Task:
    from axpo.tasks.reasoning import ReasoningTask

    return ReasoningTask(**options)


def _search(**options: Any) -> Task:
    from axpo.tasks.search import SearchTask

    return SearchTask(**options)


def _suite(**options: Any) -> Task:
    from axpo.tasks.suite import SuiteTask

    return SuiteTask(**options)


def _rows(**options: Any) -> Task:
    from axpo.tasks.rows import RowsTask

    return RowsTask(**options)


_TASKS: dict[str, Callable[..., Task]] = {
    "mini": _mini,
    "perception": _perception,
    "reasoning": _reasoning,
    "search": _search,
    "suite": _suite,
    "jsonl": _rows,
}

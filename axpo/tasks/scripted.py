"""The scripted teachers as fine-tuning sees them: from a question of an embedded task to a row, in a style."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from axpo.tasks import Question
from axpo.tasks.suite import TOOLS
from axpo.tasks.teacher import STYLES, ZOOM, Row, Style, make_row, sft_row
from axpo.tasks.text_teacher import copying, text_teacher
from axpo.tools import get_tools

if TYPE_CHECKING:
    from engine.processor import Processor

SUITE_STYLES: dict[str, dict[str, Style]] = {
    "practice": {
        "perception": Style(0.7, 0.3, miss=0.0, describe=0.4),
        "reasoning": Style(0.7, 0.3, miss=0.0, describe=0.0),
        "search": Style(0.7, 0.3, miss=0.0, describe=0.0),
    },
    "copying": {
        "perception": Style(0.7, 0.3, miss=0.0, describe=0.2),
        "reasoning": Style(0.7, 0.3, miss=0.0, describe=0.5),
        "search": Style(0.7, 0.3, miss=0.0, describe=0.5),
    },
    "teacher": {
        "perception": Style(0.43, 0.08, miss=0.55, describe=0.0),
        "reasoning": Style(0.45, 0.1, miss=0.15, describe=0.0),
        "search": Style(0.45, 0.1, miss=0.1, describe=0.0),
    },
}
"""By style and family; what each is for: `axpo.tasks.teacher`. In text copying fails often: few slips are needed."""


class Teach(Protocol):
    def __call__(self, question: Question, rng: np.random.Generator) -> Row: ...


def scripted_teacher(task: str, style: str, processor: "Processor", python: Mapping[str, Any]) -> Teach:
    """The teacher of an embedded task; the suite's calls its tools, with `python` the options of that one.

    Raises:
        ValueError: the task's teacher has no such style, or a tool cannot work on this machine.
    """
    styles = STYLES if task == "mini" else SUITE_STYLES
    if style not in styles:
        raise ValueError(f"sft.style = {style!r}: task {task!r} has {', '.join(styles)}")
    if task == "mini":
        return partial(sft_row, processor=processor, style=STYLES[style], schemas=[ZOOM.schema])
    tools = get_tools(TOOLS, {"python": python, "tavily-search": {"path": "facts"}})
    schemas = [tool.schema for tool in tools.values()]
    sessions = {name: tool.session() for name, tool in tools.items()}

    def teach(question: Question, rng: np.random.Generator) -> Row:
        family = question.meta["family"]
        manner = SUITE_STYLES[style][family]
        if family == "perception":
            return sft_row(question, rng, processor, manner, schemas)
        if manner.describe and rng.random() < manner.describe:
            return make_row(copying(rng), question, processor, schemas)
        said = text_teacher(question, rng, manner, sessions)
        return make_row([*question.messages, *said], question, processor, schemas)

    return teach

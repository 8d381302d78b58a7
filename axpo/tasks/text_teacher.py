"""The scripted teacher of the suite's reasoning and search: calls that are really made, some of them slips.

Unlike perception's, this teacher sees no more than the student: after a slip it answers what the tool showed, and is
wrong; where the tool showed nothing it calls again.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from axpo.tasks import Question
from axpo.tasks.facts import KINDS
from axpo.tasks.reasoning import DIGITS, DIRECT, DIVISOR, OPERATIONS, PRIMES, STORIES
from axpo.tasks.search import FORMS
from axpo.tasks.teacher import Style, assistant
from axpo.tools import Tool, ToolResult

RESULTS = 2  # that a search asks for
ATTEMPTS = 5
_CALLS = {
    "reasoning": ("I run it in python.", "Python can do this."),
    "search": ("I search for it.", "I have to look it up."),
}
_KNOWS = {"reasoning": "I do it in my head.", "search": "I know this one."}
_READS = {"reasoning": "I read the output.", "search": "I read the first result."}
_AGAIN = {"reasoning": "There is no output. I print it.", "search": "There is no result. I search for the name."}
_TOOL = {"reasoning": "python", "search": "tavily-search"}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
NOTHING = ("(no output)", "No results.")


def text_teacher(
    question: Question, rng: np.random.Generator, style: Style, tools: Mapping[str, Tool]
) -> list[dict[str, Any]]:
    """The messages that continue a question of reasoning or search (thoughts in `reasoning_content`).

    `tools` are sessions that answer the calls of any number of questions: no call looks at what another left. A
    trajectory without a call ends in the right answer, which the student mostly cannot know.
    """
    family = question.meta["family"]
    if rng.random() >= (style.tool_easy if question.meta["easy"] else style.tool_hard):
        return [assistant(_KNOWS[family], _answer(question.answer))]
    slip = bool(rng.random() < style.miss)
    arguments = _code(question, rng, slip) if family == "reasoning" else _query(question, rng, slip)
    messages: list[dict[str, Any]] = []
    thought = _CALLS[family][rng.integers(len(_CALLS[family]))]
    tool = tools[_TOOL[family]]
    while True:
        shown = _call(tool, arguments)
        call = {"type": "function", "function": {"name": tool.name, "arguments": arguments}}
        messages += [
            assistant(thought, "") | {"tool_calls": [call]},
            {"role": "tool", "content": [{"type": "text", "text": shown.text}]},
        ]
        if shown.text not in NOTHING:
            return [*messages, assistant(_READS[family], _answer(_read(question, shown.text)))]
        thought = _AGAIN[family]
        arguments = _code(question, rng, False) if family == "reasoning" else _query(question, rng, False)


def copying(rng: np.random.Generator) -> list[dict[str, Any]]:
    """A conversation in which what the user wrote, words and numbers that mean nothing, is said again."""
    parts = []
    for _ in range(int(rng.integers(4, 9))):
        if rng.random() < 0.5:
            letters = rng.integers(len(_LETTERS), size=rng.integers(2, 11))
            parts.append("".join(_LETTERS[letter] for letter in letters).capitalize())
        else:
            parts.append("".join(map(str, rng.integers(10, size=rng.integers(2, 8)))))
    text = " ".join(parts)
    return [{"role": "user", "content": text}, assistant(text, "")]


def _call(tool: Tool, arguments: dict[str, Any]) -> ToolResult:
    """The call's result; a machine that stands still for a while makes a kernel time out, so it is tried again."""
    shown = tool.call(arguments, [])
    for _ in range(ATTEMPTS - 1):
        if not shown.ok:
            shown = tool.call(arguments, [])
    if not shown.ok:
        raise RuntimeError(f"the teacher's own call of {tool.name} with {arguments} failed: {shown.error}")
    return shown


def _code(question: Question, rng: np.random.Generator, slip: bool) -> dict[str, Any]:
    """The expression, printed; a slip has another operator, another number, or does not print."""
    expression, form = question.meta["expression"], "{}print({})"
    kind = int(rng.integers(3)) if slip else None
    if kind == 0 and (operator := re.search(r"(?<=\d)(//|[-+*%])(?=\d)", expression)):
        possible = OPERATIONS if _divides(expression) else "+-*"
        others = [other for other in possible if other != operator[1]]
        expression = expression.replace(operator[1], others[rng.integers(len(others))], 1)
    elif kind in (0, 1):
        numbers = list(re.finditer(r"\d{2,}", expression)) or list(re.finditer(r"\d", expression))
        number = numbers[rng.integers(len(numbers))]
        at = int(rng.integers(number.start(), number.end()))
        digit = str(int(rng.integers(1, 10)))
        expression = expression[:at] + digit + expression[at + 1 :]
    elif kind == 2:
        form = "{}n={}"
    return {"code": form.format(question.meta["imports"], expression)}


def _divides(expression: str) -> bool:
    """Whether every number could be a divisor."""
    return not re.search(r"(?<!\d)0(?!\d)", expression)


def _query(question: Question, rng: np.random.Generator, slip: bool) -> dict[str, Any]:
    """The name with its kind; a slip has no name, or only a part of it, which may find nothing."""
    kind, name, attribute = (question.meta[key] for key in ("kind", "name", "attribute"))
    query = f"{kind} {name}"
    if slip:
        part = name[: max(2, len(name) // 2)].strip(" -")
        query = (f"{kind} {attribute}", f"{kind} {part}", part)[rng.integers(3)]
    return {"query": query, "max_results": RESULTS}


def _read(question: Question, shown: str) -> str:
    """What the tool's text gives as the answer: the printed number, or the asked code of the first result."""
    if question.meta["family"] == "reasoning":
        return shown.strip()
    attribute = re.escape(question.meta["attribute"])
    found = re.search(rf"{attribute} \((\w+)\)", shown) or re.search(r"\((\w+)\)", shown)
    return found[1] if found else question.answer


def _answer(answer: str) -> str:
    return rf"<answer>\boxed{{{answer}}}</answer>"


def sentences() -> Iterator[str]:
    """Everything that this teacher, its questions and its tools say, without names and numbers."""
    for texts in (_CALLS, STORIES):
        for forms in texts.values():
            yield from (re.sub(r"\{\w*\}", "", form) for form in forms)
    for texts in (_KNOWS, _READS, _AGAIN):
        yield from texts.values()
    yield from (text.replace("{}", "") for text in (DIRECT, DIGITS, PRIMES, DIVISOR))
    for kind in KINDS:
        yield f"The {kind} of the {kind}"
        for attribute in ("three-letter code", "two-letter code", "numeric code", "country code"):
            yield from (form.format(attribute=attribute, kind=kind, name="") for form in FORMS)
            yield f"It has the {attribute}; {attribute}"
            yield attribute
        yield kind
    yield from NOTHING

"""What a row is (docs/data.md): the fields of a record, checked one by one."""

import base64
import binascii
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from axpo.grading import Rubric
from axpo.images import load_image, png_bytes
from axpo.tasks import Question

INSTRUCTION = r"Give the final answer as <answer>\boxed{...}</answer>."
_ASKED = ("id", "question", "images", "answer")
_OTHER = ("messages", "grader", "options", "tolerance", "threshold", "meta")
FIELDS = (*_ASKED, *_OTHER)
_ROLES = ("system", "user", "assistant", "tool")

Picture = Path | bytes
"""An image that has not been decoded: its file, or its bytes."""


@dataclass(frozen=True, slots=True)
class Row:
    """A question, or a conversation to learn from.

    messages: chat messages, of which every image part is a bare {"type": "image"}. pictures: one for each of them.
    rubric: None where a conversation has no answer. A conversation ends with the assistant, a question with the user.
    """

    id: str
    messages: list[dict[str, Any]]
    pictures: tuple[Picture, ...]
    rubric: Rubric | None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def is_conversation(self) -> bool:
        return self.messages[-1]["role"] == "assistant"

    def images(self) -> list[Any]:
        """The pictures as RGB images; ValueError names the one that is missing, too large or cannot be decoded."""
        return [load_image(picture, f"images[{index}]") for index, picture in enumerate(self.pictures)]

    def record(self) -> dict[str, Any]:
        """As axpo.data.write takes it: what `parse_row` makes the same row of."""
        record = {"id": self.id, "messages": self.messages, "images": list(self.pictures), "meta": self.meta}
        if self.rubric is None:
            return record
        rubric = asdict(self.rubric)
        return {**record, "answer": list(rubric.pop("answers")), "grader": rubric.pop("kind"), **rubric} | {
            "options": list(self.rubric.options)
        }

    @classmethod
    def of(cls, question: Question) -> "Row":
        """The row that asks the same, whatever task the question is from."""
        pictures = tuple(map(png_bytes, question.images))
        return cls(question.id, question.messages, pictures, question.rubric, question.meta)

    def question(self) -> Question:
        """What is asked, images decoded now."""
        assert self.rubric is not None, f"row {self.id!r} has no answer"
        return Question(self.id, self.messages, self.images(), self.rubric.answers[0], self.meta, self.rubric)


def parse_row(record: Any, folder: Path) -> tuple[Row | None, list[str]]:
    """The row of a record, or None with every problem, each naming its field; relative paths are below `folder`."""
    if not isinstance(record, dict):
        return None, [f"must be a JSON object with {', '.join(_ASKED)}, got {type(record).__name__}"]
    name = f"row {record['id']!r}: " if isinstance(record.get("id"), str) else ""
    record = {key: value for key, value in record.items() if value is not None or key in _ASKED}  # Parquet has no gaps
    problems = [
        f"{key}: unknown field; a row has {', '.join(_ASKED)}, or {', '.join(_OTHER)}"
        for key in record
        if key not in FIELDS
    ]
    row_id = text_field(record, "id", problems)
    pictures = _pictures(record.get("images"), folder, problems)
    messages, pictures = _messages(record, pictures, folder, problems)
    meta = _json(record.get("meta") or {})
    if not isinstance(meta, dict):
        problems.append(f"meta = {_short(meta)}: must be an object")
    ends = messages[-1]["role"] if messages else "user"
    if ends == "tool" or ends == "system":
        problems.append(f"messages: the last is of role {ends!r}; it must be the user's question, or an assistant's")
    elif ends == "assistant":
        problems += _turn_problems(messages)
    rubric = None if ends == "assistant" and record.get("answer") is None else _rubric(record, problems)
    if problems:
        return None, [f"{name}{problem}" for problem in problems]
    return Row(row_id, messages, tuple(pictures), rubric, meta), []


def check_pictures(row: Row) -> list[str]:
    """Decodes the row's images: a problem for each that is missing, too large or damaged."""
    problems = []
    for index, picture in enumerate(row.pictures):
        try:
            load_image(picture, f"images[{index}]")
        except ValueError as error:
            problems.append(str(error) if isinstance(picture, bytes) else f"images[{index}]: {error}")
    return problems


def text_field(record: dict[str, Any], name: str, problems: list[str]) -> str:
    """A field as text (a number is taken as it is written); a missing, empty or other value adds a problem."""
    value = record.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):  # NaN: pandas' nothing
        value = str(value)
    if name not in record:
        problems.append(f"{name}: missing")
    elif not isinstance(value, str) or not value.strip():
        problems.append(f"{name} = {_short(value)}: must be text that is not empty")
    elif not _is_unicode(value):
        problems.append(f"{name} = {_short(value)}: has half of a surrogate pair, which is no text")
    return value if isinstance(value, str) else ""


def _messages(
    record: dict[str, Any], pictures: list[Picture], folder: Path, problems: list[str]
) -> tuple[list[dict[str, Any]], list[Picture]]:
    """Chat messages with bare image parts, and the pictures in their order."""
    if record.get("messages") is None:
        text = text_field(record, "question", problems)
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": f"{text}\n{INSTRUCTION}"}]
        return [{"role": "user", "content": content}], pictures
    if record.get("question") is not None:
        problems.append("question: there is messages already; give one of the two")
    given = _json(record["messages"])
    if not isinstance(given, list) or not given or not all(isinstance(message, dict) for message in given):
        problems.append(f"messages = {_short(given)}: must be a list of {{role, content}}")
        return [], pictures
    ordered: list[Picture] = []
    left = iter(pictures)
    messages = [_message(m, f"messages[{i}]", left, ordered, folder, problems) for i, m in enumerate(given)]
    if over := len(list(left)):
        problems.append(f"images: {over} more than messages have parts {{type: image}}")
    return messages, ordered


def _message(given: dict[str, Any], name: str, left: Any, ordered: list[Picture], folder: Path, problems: list[str]):
    message = {key: value for key, value in given.items() if value is not None}
    role, content = message.get("role"), message.get("content", "")
    if role not in _ROLES:
        problems.append(f"{name}.role = {_short(role)}: must be {', '.join(_ROLES)}")
        message["role"] = "user"
    if isinstance(content, str):
        if not content.strip() and not message.get("tool_calls"):
            problems.append(f"{name}.content = {_short(content)}: must be text that is not empty, or a list of parts")
        elif not _is_unicode(content):
            problems.append(f"{name}.content = {_short(content)}: has half of a surrogate pair, which is no text")
        return {**message, "content": content}
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        problems.append(f"{name}.content = {_short(content)}: must be text, or a list of parts")
        return {**message, "content": ""}
    parts = []
    for index, part in enumerate(content):
        kind, where = part.get("type"), f"{name}.content[{index}]"
        if kind == "text" and isinstance(part.get("text"), str) and _is_unicode(part["text"]):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url"):
            parts.append({"type": "image"})
            url = part.get("image_url")
            own = part.get("image") or (url.get("url") if isinstance(url, dict) else url)
            picture = next(left, None) if own is None else _picture(own, folder, where, problems)
            if picture is not None:
                ordered.append(picture)
            elif own is None:
                problems.append(f"{where}: an image part, but images has no more")
        else:
            problems.append(f"{where}: must be {{type: text, text}} or {{type: image}}, got {_short(part)}")
    return {**message, "content": parts}


def _turn_problems(messages: list[dict[str, Any]]) -> list[str]:
    """What keeps a conversation from being one that a rollout could have had."""
    roles = [message["role"] for message in messages]
    first = roles.index("assistant")
    problems = []
    if first == 0 or any(role not in ("system", "user") for role in roles[:first]):
        problems.append("messages: system and user come before the first assistant, and at least one of them")
    for index in range(first + 1, len(roles)):
        if roles[index] not in ("tool", "assistant"):
            problems.append(
                f"messages[{index}]: role {roles[index]!r} after the first answer; only tool and assistant may follow"
            )
        elif roles[index] == roles[index - 1] == "assistant":
            problems.append(f"messages[{index}]: two assistant turns without a tool response between them")
    return problems + [
        f"messages[{index}].{name}: write it into content, as the model says it"
        for index, message in enumerate(messages)
        for name in ("tool_calls", "reasoning_content")
        if message["role"] == "assistant" and message.get(name)
    ]


def _pictures(given: Any, folder: Path, problems: list[str]) -> list[Picture]:
    given = [] if given is None else given
    if not isinstance(given, list) or not all(isinstance(one, str | bytes | dict | Path) and one for one in given):
        problems.append(f"images = {_short(given)}: must be a list of file names, data URIs or {{bytes, path}}")
        return []
    pictures = [_picture(one, folder, f"images[{index}]", problems) for index, one in enumerate(given)]
    return [picture for picture in pictures if picture is not None]


def _picture(given: Any, folder: Path, name: str, problems: list[str]) -> Picture | None:
    """An image as it is stored: bytes, {bytes, path} (`datasets`), a data URI, or a path."""
    if isinstance(given, dict):
        given = given.get("bytes") or given.get("path")
    if isinstance(given, bytes | Path):
        return given
    if not isinstance(given, str) or not given:
        problems.append(f"{name} = {_short(given)}: must be a file name, a data URI, or {{bytes, path}}")
        return None
    if given.startswith(("http://", "https://")):
        problems.append(f"{name} = {_short(given)}: a web address; download it and name the file")
        return None
    if not given.startswith("data:"):
        return folder / given
    head, comma, body = given.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("it must begin with data:image/…;base64,")
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        problems.append(f"{name}: not a data URI of an image: {error}")
        return None


def _rubric(record: dict[str, Any], problems: list[str]) -> Rubric | None:
    answers = record.get("answer")
    if not isinstance(answers, list) or not answers:
        answers = [text_field(record, "answer", problems)]
    else:
        answers = [text_field({"answer": answer}, "answer", problems) for answer in answers]
    if wrong := [answer for answer in answers if answer.count("{") != answer.count("}")]:
        problems.append(f"answer = {wrong[0]!r}: braces do not match, so no \\boxed{{…}} can hold it")
    options = record.get("options", [])
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        problems.append(f"options = {_short(options)}: must be a list of texts")
    for name in ("tolerance", "threshold"):
        if not isinstance(record.get(name, 0.5), int | float):
            problems.append(f"{name} = {_short(record[name])}: must be a number")
    if problems:
        return None
    numbers = {name: float(record[name]) for name in ("tolerance", "threshold") if name in record}
    try:
        return Rubric(tuple(answers), record.get("grader", "exact"), tuple(options), **numbers)
    except ValueError as error:
        problems.append(str(error))
        return None


def _is_unicode(text: str) -> bool:
    """JSON may write what no tokenizer can read: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json(value: Any) -> Any:
    """Parquet columns hold nested objects of any shape as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"

"""Conversations to fine-tune on, one JSON object a line: {id, messages}, the assistant's words as they were sampled.

messages: OpenAI's roles. `system` and `user` come first, then `assistant` and `tool` in turns, an assistant's last.
Content is text, or parts {"type": "text", "text": …} and {"type": "image", "image": path}, paths relative to the file.
An assistant's content is what it said behind the generation prompt, thinking and <tool_call> included, without
<|im_end|>; one that repeats the <think> which the template opens may do so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axpo.tasks.jsonl import JsonlError, load_image
from axpo.tasks.teacher import Row
from axpo.tools import ToolResult

if TYPE_CHECKING:
    from axpo.conversation import Conversation

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Dialogue:
    id: str
    messages: list[dict[str, Any]]


class ConversationFile:
    """Every row is checked once, here, and that its images are there: JsonlError lists line and field."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._rows: list[Dialogue] = []
        problems: list[str] = []
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise JsonlError(f"{path}: cannot be read: {error}") from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                wrong = _problems(line, self.path.parent)
                problems += [f"{path}:{number}: {problem}" for problem in wrong]
                if not wrong:
                    record = json.loads(line)
                    self._rows.append(Dialogue(record["id"], record["messages"]))
        if problems:
            more = [f"… and {len(problems) - _SHOWN} more problems"] if len(problems) > _SHOWN else []
            raise JsonlError("\n".join(problems[:_SHOWN] + more))
        if not self._rows:
            raise JsonlError(f"{path}: no rows; each line is a JSON object with id and messages")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Dialogue:
        return self._rows[index]

    def row(self, index: int, conversation: Conversation) -> Row:
        """Tokens as a rollout has them: the prompt rendered once, each turn and each tool response appended."""
        messages, processor = self._rows[index].messages, conversation.processor
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        images = [processor.image(image) for message in messages[:first] for image in self._images(message)]
        tokens = conversation.prompt([_without_files(message) for message in messages[:first]], images)
        mask = [0] * len(tokens)
        results: list[ToolResult] = []
        for position, message in enumerate(messages[first:], start=first + 1):
            if message["role"] == "tool":
                results.append(ToolResult(True, _text(message), self._images(message)))
                if position < len(messages) and messages[position]["role"] == "tool":
                    continue  # one turn shows all responses
                shown = [processor.image(image) for result in results for image in result.images]
                new, trained = conversation.observation(results, shown), 0
                images += shown
                results = []
            else:
                said = _text(message).removeprefix("<think>\n") if conversation.thinks else _text(message)
                new, trained = [*processor.encode_text(said), conversation.end_of_turn], 1
            tokens += new
            mask += [trained] * len(new)
        return Row(tokens, mask, images, [])

    def _images(self, message: dict[str, Any]) -> list[Any]:
        return [load_image(self.path.parent / part["image"]) for part in _parts(message) if part["type"] == "image"]


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in _parts(message) if part["type"] == "text")


def _without_files(message: dict[str, Any]) -> dict[str, Any]:
    """The template asks for a placeholder, whose pixels come separately."""
    return {**message, "content": [p if p["type"] == "text" else {"type": "image"} for p in _parts(message)]}


def _problems(line: str, folder: Path) -> list[str]:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        return [f"not valid JSON: {error}"]
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        return ["must be a JSON object with id, a text, and messages"]
    messages, name = record.get("messages"), f"row {record['id']!r}: "
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return [f"{name}messages must be a list of objects with role and content"]
    roles = [message.get("role") for message in messages]
    problems = []
    if "assistant" not in roles or roles[-1] != "assistant":
        problems.append("the last message must be an assistant's")
    if "assistant" in roles:
        first = roles.index("assistant")
        if first == 0 or any(role not in ("system", "user") for role in roles[:first]):
            problems.append("system and user come before the first assistant, and at least one of them")
        problems += [
            f"messages[{i}]: role {role!r} after the first answer; only tool and assistant may follow"
            for i, role in enumerate(roles)
            if i > first and role not in ("tool", "assistant")
        ]
        problems += [
            f"messages[{i}]: two assistant turns without a tool response between them"
            for i in range(first + 1, len(roles))
            if roles[i] == roles[i - 1] == "assistant"
        ]
    for index, message in enumerate(messages):
        problems += [f"messages[{index}].{problem}" for problem in _content_problems(message.get("content"), folder)]
    return [f"{name}{problem}" for problem in problems]


def _content_problems(content: Any, folder: Path) -> list[str]:
    if isinstance(content, str):
        return []
    if not isinstance(content, list):
        return [f"content = {content!r}: must be text or a list of parts"]
    problems = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image") or not isinstance(part.get(kind), str):
            problems.append(f"content[{index}] = {part!r}: must be a text or an image with its path")
        elif kind == "image" and not (folder / part["image"]).is_file():
            problems.append(f"content[{index}].image = {part['image']!r}: no such file beside the rows")
    return problems

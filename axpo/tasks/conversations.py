"""Conversations to fine-tune on (docs/data.md): the tokens of a rollout, of which the assistant's words are trained."""

from itertools import islice
from typing import TYPE_CHECKING, Any

from axpo.data import Row
from axpo.tasks import teacher
from axpo.tools import ToolResult

if TYPE_CHECKING:
    from axpo.conversation import Conversation


def conversation_row(row: Row, conversation: "Conversation") -> teacher.Row:
    """Tokens as a rollout has them: the prompt rendered once, each turn and each tool response appended.

    Raises:
        ValueError: an image is missing or cannot be decoded.
    """
    messages, processor, pictures = row.messages, conversation.processor, iter(row.images())
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    images = [processor.image(image) for message in messages[:first] for image in _images(message, pictures)]
    tokens = conversation.prompt(messages[:first], images)
    mask = [0] * len(tokens)
    results: list[ToolResult] = []
    for position, message in enumerate(messages[first:], start=first + 1):
        if message["role"] == "tool":
            results.append(ToolResult(True, _text(message), _images(message, pictures)))
            if messages[position]["role"] == "tool":
                continue  # one turn shows all responses
            shown = [processor.image(image) for result in results for image in result.images]
            new, trained = conversation.observation(results, shown), 0
            images += shown
            results = []
        else:
            said = _text(message).removeprefix("<think>\n") if conversation.thinks else _text(message)
            new, trained = conversation.turn(said), 1
        tokens += new
        mask += [trained] * len(new)
    return teacher.Row(tokens, mask, images, [])


def _images(message: dict[str, Any], pictures: Any) -> list[Any]:
    return list(islice(pictures, sum(part["type"] == "image" for part in _parts(message))))


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in _parts(message) if part["type"] == "text")

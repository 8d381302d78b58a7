"""Finds tool calls among a turn's sampled tokens, by token id: a tag in letters or inside <think> is no call."""

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Markup:
    """Token ids of the tags that structure a turn."""

    tool_call: int
    tool_call_end: int
    think: int
    think_end: int

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "Markup":
        """Looks the tags up.

        Raises:
            ValueError: a tag is not one token of this tokenizer.
        """
        ids = []
        for tag in ("<tool_call>", "</tool_call>", "<think>", "</think>"):
            tokens = tokenizer.encode(tag, add_special_tokens=False)
            if len(tokens) != 1:
                raise ValueError(f"{tag} is {len(tokens)} tokens of this tokenizer; calls are found by a single token")
            ids.append(tokens[0])
        return cls(*ids)


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One call of a turn; `tokens[start:end]` spans both tags. Malformed exactly when `error` is set."""

    name: str | None
    arguments: dict[str, Any] | None
    start: int
    end: int
    error: str | None = None


def parse_calls(
    tokens: Sequence[int],
    markup: Markup,
    decode: Callable[[Sequence[int]], str],
    known: Collection[str] | None = None,
    *,
    thinking: bool = True,
    stop: Collection[int] = (),
) -> list[ParsedCall]:
    """All calls of one turn, in order.

    tokens: what was sampled in the turn. thinking: the generation prompt has opened <think> (Qwen3-VL-Thinking does).
    known: names of the tools on offer; None accepts any. stop: ids that end the turn's text (<|im_end|>).
    An `error` is written for the model to read.
    A call that is never closed reaches to the next opening tag or to the end of the turn's text.
    """
    if markup.tool_call not in tokens:
        return []
    end_of_text = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
    calls: list[ParsedCall] = []
    start: int | None = None
    for index in range(end_of_text):
        token = tokens[index]
        if start is None:
            if token == markup.think:
                thinking = True
            elif token == markup.think_end:
                thinking = False
            elif token == markup.tool_call and not thinking:
                start = index
        elif token == markup.tool_call_end:
            calls.append(_parse(decode(tokens[start + 1 : index]), start, index + 1, known))
            start = None
        elif token == markup.tool_call:
            calls.append(_unclosed(start, index))
            start = index
    if start is not None:
        calls.append(_unclosed(start, end_of_text))
    return calls


def _unclosed(start: int, end: int) -> ParsedCall:
    return ParsedCall(None, None, start, end, "the tool call is not closed: end it with </tool_call>")


def _parse(text: str, start: int, end: int, known: Collection[str] | None) -> ParsedCall:
    try:
        value = _DECODER.decode(text)
        _ENCODER.encode(value).encode()  # "\ud800" is valid JSON that no file can hold
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        elif isinstance(error, UnicodeEncodeError):
            reason = "it has half of a surrogate pair"
        return ParsedCall(None, None, start, end, f"the tool call is not valid JSON: {reason}")
    if not isinstance(value, dict):
        message = f"the tool call is a JSON {_kind(value)}; it must be an object with name and arguments"
        return ParsedCall(None, None, start, end, message)
    name, arguments = value.get("name"), value.get("arguments")
    if not isinstance(name, str) or not name:
        problem = "has no name" if "name" not in value else f"has a {_kind(name)} as its name"
        return ParsedCall(None, None, start, end, f"the tool call {problem}; give the name of a tool")
    if known is not None and name not in known:
        message = f"there is no tool {name!r}; there is: {', '.join(known)}"
        return ParsedCall(name, arguments if isinstance(arguments, dict) else None, start, end, message)
    if not isinstance(arguments, dict):
        problem = "are missing" if "arguments" not in value else f"are a JSON {_kind(arguments)}"
        return ParsedCall(name, None, start, end, f"the arguments of {name} {problem}; they must be an object")
    return ParsedCall(name, arguments, start, end)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):  # 1e999 would be written as Infinity, which is not JSON
        raise ValueError(f"{literal[:40]} is too large")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_ENCODER = json.JSONEncoder(ensure_ascii=False)


def _kind(value: Any) -> str:
    names = {str: "string", list: "array", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "object")

"""Tokens in, tokens out: the template renders the first prompt and what follows a call, never the history."""

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from jinja2.exceptions import TemplateError

from axpo.tools import Tool, ToolResult
from axpo.tools.parse import Markup, ParsedCall, parse_calls
from engine import ImageInput, Processor

_TURN = "\N{REPLACEMENT CHARACTER}turn\N{REPLACEMENT CHARACTER}"  # stands for an assistant turn while rendering
_END_OF_TURN = "<|im_end|>"
_BREAK = "\ufdd0"
"""Cuts a tag that somebody quotes in two while a template is rendered: no text has it, Unicode gives it no meaning."""
_OF_A_TURN = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # what a model says with a meaning

PROMPTS = 256  # that are remembered as token ids
_CHARACTERS = 32  # a token, of a text that is cut before it is encoded

Message = dict[str, Any]


class Conversation:
    """How questions, turns and tool results look to one checkpoint with one set of tools.

    schemas: of tools that are shown and not called; by default those of `tools`.

    Raises:
        ValueError: the checkpoint's template cannot show the tools or what they answer, or it ends turns otherwise.
    """

    def __init__(self, processor: Processor, tools: dict[str, Tool], schemas: list[dict[str, Any]] | None = None):
        self.processor = processor
        self.tools = tools
        self.schemas = [tool.schema for tool in tools.values()] if schemas is None else schemas
        self.markup = Markup.of(processor.tokenizer)
        ids = processor.tokenizer.encode(_END_OF_TURN, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"{processor.path}: {_END_OF_TURN} is {len(ids)} tokens; turns must end in a single token")
        self.end_of_turn: int = ids[0]
        tags = _tags(processor.tokenizer)
        self._tags, self._foreign = _starts(tags), _starts([tag for tag in tags if tag not in _OF_A_TURN])
        self._prompts: dict[str, list[int]] = {}
        # Most calls of a tool answer in the same words, and a template takes longer than a decode step.
        self._observation = lru_cache(maxsize=256)(self._encode_observation)
        if self.schemas:
            self._check_tools()

    def prompt(self, messages: list[Message], images: Sequence[ImageInput]) -> list[int]:
        """Token ids of a question, its tools and the generation prompt.

        Raises:
            ValueError: the template refuses the messages, or leaves out what one of them says.
        """
        key = repr(messages)
        if key not in self._prompts:  # questions that differ in their image alone are written alike
            if len(self._prompts) >= PROMPTS:
                self._prompts.clear()
            letters = [self._letters(message) for message in messages]
            rendered = self._render(letters, self.schemas)
            for number, message in enumerate(letters):
                if message["role"] != "assistant" and not all(text.strip() in rendered for text in _texts(message)):
                    raise ValueError(
                        f"{self.processor.path}: its chat template leaves out messages[{number}], which is of role "
                        f"{message['role']!r}; put its text into another"
                    )
            self._prompts[key] = self._encode(rendered)
        return self.processor.expand(self._prompts[key], images)

    def observation(self, results: Sequence[ToolResult], images: Sequence[ImageInput]) -> list[int]:
        """Token ids of the tool responses that follow a turn's <|im_end|>, with the next generation prompt."""
        shapes = tuple((result.text, len(result.images)) for result in results)
        return self.processor.expand(self._observation(shapes), images)

    def turn(self, said: str) -> list[int]:
        """Token ids of what an assistant said, with its <|im_end|>: of quoted tags only those of a turn are its own."""
        return [*self._encode(self._own(said)), self.end_of_turn]

    def shorten(self, text: str, max_tokens: int) -> str:
        """A tool's text; behind `max_tokens` (0: any number) it is cut, and a note says so."""
        if not max_tokens or len(text.encode()) <= max_tokens:
            return text
        head = text[: _CHARACTERS * max_tokens]
        ids = self._encode(self._quote(head))
        if len(ids) <= max_tokens and len(head) == len(text):
            return text
        shown = self.processor.decode(ids[:max_tokens]).rstrip("\N{REPLACEMENT CHARACTER}")  # of half a character
        return f"{shown}\n… cut: {len(shown)} of {len(text)} characters are shown"

    @cached_property
    def thinks(self) -> bool:
        """The generation prompt opens <think>, so that a turn's first tokens are thinking."""
        return self._render([{"role": "user", "content": "?"}]).rstrip().endswith("<think>")

    def calls(self, turn: Sequence[int]) -> list[ParsedCall]:
        """The tool calls of one turn's sampled tokens."""
        decode = self.processor.decode
        return parse_calls(turn, self.markup, decode, self.tools, thinking=self.thinks, stop=(self.end_of_turn,))

    def inline(self, name: str) -> bool:
        """An unknown tool fails at once, which needs no thread either."""
        return name not in self.tools or self.tools[name].inline

    def _encode_observation(self, shapes: tuple[tuple[str, int], ...]) -> list[int]:
        """Tool responses as (text, number of images) each, one placeholder an image."""
        return self._encode(self._after_turn(shapes))

    def _after_turn(self, shapes: Sequence[tuple[str, int]]) -> str:
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _TURN}]
        responses = [self._letters({"role": "tool", "content": _content(text, images)}) for text, images in shapes]
        return self._render(turn + responses).partition(_TURN)[2].partition(_END_OF_TURN)[2]

    def _check_tools(self) -> None:
        """A template may ignore what it does not know: nothing would tell but the model, which never calls."""
        rendered = self._render([{"role": "user", "content": "?"}], self.schemas)
        hidden = [name for schema in self.schemas if (name := schema["function"]["name"]) not in rendered]
        if hidden:
            problem = f"its chat template does not show the tool {hidden[0]!r} to the model"
        elif "42" not in self._after_turn([("42", 0)]):
            problem = "its chat template does not show what a tool answers (role 'tool') behind an assistant's turn"
        else:
            return
        raise ValueError(f"{self.processor.path}: {problem}; take a template that does, or set rollout.tools to []")

    def _render(self, messages: list[Message], schemas: list[dict[str, Any]] | None = None) -> str:
        try:
            return self.processor.render(messages, schemas or None)
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"{self.processor.path}: its chat template refuses messages of roles {roles}: {error}"
            ) from error

    def _encode(self, rendered: str) -> list[int]:
        return [token for part in rendered.split(_BREAK) for token in self.processor.encode_text(part)]

    def _quote(self, text: str) -> str:
        """What people and tools write, with tags that are letters to the tokenizer: a quoted <|image_pad|> is text."""
        return self._tags.sub(rf"\1{_BREAK}", text.replace(_BREAK, "\N{REPLACEMENT CHARACTER}"))

    def _letters(self, message: Message) -> Message:
        """The message with quoted tags, and one text where it has no image: not every template takes parts.

        An assistant's <think> and <tool_call> keep their meaning, which templates look for.
        """
        spoken = ("content", "reasoning_content") if message["role"] == "assistant" else ()
        quoted = {
            name: value if name == "role" else _map(self._own if name in spoken else self._quote, value)
            for name, value in message.items()
        }
        texts, content = _texts(quoted), quoted.get("content")
        only_text = isinstance(content, list) and len(texts) == len(content)
        return {**quoted, "content": "".join(texts)} if only_text else quoted

    def _own(self, said: str) -> str:
        return self._foreign.sub(rf"\1{_BREAK}", said.replace(_BREAK, "\N{REPLACEMENT CHARACTER}"))


def _content(text: str, images: int) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    return parts + [{"type": "image"}] * images


def _texts(message: Message) -> list[str]:
    content = message.get("content")
    if not isinstance(content, list):
        return [content] if content else []
    return [part["text"] for part in content if part.get("type") == "text"]


def _map(change: Any, value: Any) -> Any:
    """Every text in a message's value, changed; names of fields stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map(change, one) for one in value]
    return {name: _map(change, one) for name, one in value.items()} if isinstance(value, dict) else value


def _tags(tokenizer: Any) -> list[str]:
    """What the tokenizer finds in any text and gives a meaning: special tokens, and others of the form <…>."""
    added = tokenizer.added_tokens_decoder.values()
    return [
        token.content
        for token in added
        if len(token.content) > 1 and (token.special or re.fullmatch(r"</?[^<>\s]+>", token.content))
    ]


def _starts(tags: Sequence[str]) -> re.Pattern[str]:
    """Matches the first character of each tag, also of those that overlap."""
    longest_first = sorted(tags, key=len, reverse=True)
    return re.compile(rf"(?=(?:{'|'.join(map(re.escape, longest_first))}))(.)", re.DOTALL)

"""Tokens in, tokens out: the template renders the first prompt and what follows a call, never the history."""

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from axpo.tools import Tool, ToolResult
from axpo.tools.parse import Markup, ParsedCall, parse_calls
from engine import ImageInput, Processor

_TURN = "\N{REPLACEMENT CHARACTER}turn\N{REPLACEMENT CHARACTER}"  # stands for an assistant turn while rendering
_END_OF_TURN = "<|im_end|>"
_MARKUP = re.compile(r"<(?=\|[^<>|\s]+\|>|/?(?:think|tool_call|tool_response)>)")

PROMPTS = 256  # that are remembered as token ids


class Conversation:
    """How questions, turns and tool results look to one checkpoint with one set of tools."""

    def __init__(self, processor: Processor, tools: dict[str, Tool]):
        self.processor = processor
        self.tools = tools
        self.schemas = [tool.schema for tool in tools.values()] or None
        self.markup = Markup.of(processor.tokenizer)
        ids = processor.tokenizer.encode(_END_OF_TURN, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"{processor.path}: {_END_OF_TURN} is {len(ids)} tokens; turns must end in a single token")
        self.end_of_turn: int = ids[0]
        self._prompts: dict[str, list[int]] = {}
        # Most calls of a tool answer in the same words, and a template takes longer than a decode step.
        self._observation = lru_cache(maxsize=256)(self._encode_observation)

    def prompt(self, messages: list[dict[str, Any]], images: Sequence[ImageInput]) -> list[int]:
        """Token ids of a question, its tools and the generation prompt."""
        key = repr(messages)
        if key not in self._prompts:  # questions that differ in their image alone are written alike
            if len(self._prompts) >= PROMPTS:
                self._prompts.clear()
            letters = [{**message, "content": _letters(message["content"])} for message in messages]
            self._prompts[key] = self.processor.encode_text(self.processor.render(letters, self.schemas))
        return self.processor.expand(self._prompts[key], images)

    def observation(self, results: Sequence[ToolResult], images: Sequence[ImageInput]) -> list[int]:
        """Token ids of the tool responses that follow a turn's <|im_end|>, with the next generation prompt."""
        shapes = tuple((result.text, len(result.images)) for result in results)
        return self.processor.expand(self._observation(shapes), images)

    def _encode_observation(self, shapes: tuple[tuple[str, int], ...]) -> list[int]:
        """Tool responses as (text, number of images) each, one placeholder an image."""
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _TURN}]
        responses = [{"role": "tool", "content": _content(text, images)} for text, images in shapes]
        rendered = self.processor.render(turn + responses)
        return self.processor.encode_text(rendered.partition(_TURN)[2].partition(_END_OF_TURN)[2])

    @cached_property
    def thinks(self) -> bool:
        """The generation prompt opens <think>, so that a turn's first tokens are thinking."""
        return self.processor.render([{"role": "user", "content": "?"}]).rstrip().endswith("<think>")

    def calls(self, turn: Sequence[int]) -> list[ParsedCall]:
        """The tool calls of one turn's sampled tokens."""
        decode = self.processor.decode
        return parse_calls(turn, self.markup, decode, self.tools, thinking=self.thinks, stop=(self.end_of_turn,))

    def inline(self, name: str) -> bool:
        """An unknown tool fails at once, which needs no thread either."""
        return name not in self.tools or self.tools[name].inline


def _content(text: str, images: int) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = _letters([{"type": "text", "text": text}]) if text else []
    return parts + [{"type": "image"}] * images


def _letters(content: Any) -> Any:
    """What people and tools write, with tags that no tokenizer takes for its own: a quoted <|image_pad|> is text."""
    if isinstance(content, str):
        return _MARKUP.sub("< ", content)
    return [{**part, "text": _letters(part["text"])} if part.get("type") == "text" else part for part in content]

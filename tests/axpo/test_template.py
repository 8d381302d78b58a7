"""Random conversations: what the loop renders and appends is transformers' own render of the whole, token for token."""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from axpo.conversation import Conversation
from axpo.tasks.build_mini import build_mini
from axpo.tools import Tool, ToolResult
from engine.processor import Processor
from tests.axpo import templates

FAMILIES = ("embedded", "thinking", "instruct")


class Whole:
    """transformers' side: its template, its tokenizer, its count of an image's tokens."""

    def __init__(self, path: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.pictures = AutoImageProcessor.from_pretrained(path)

    def tokens(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], images: list[Image.Image]
    ) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=True
        )
        counts = iter([self.count(image) for image in images])
        text = re.sub(r"<\|image_pad\|>", lambda pad: pad[0] * next(counts), text)
        assert next(counts, None) is None
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def count(self, image: Image.Image) -> int:
        grid = self.pictures(images=[image], return_tensors="np")["image_grid_thw"][0]
        return int(np.prod(grid)) // self.pictures.merge_size**2


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Processor, Whole]]:
    made = {}
    for name in FAMILIES:
        path = tmp_path_factory.mktemp(name)
        if name == "embedded":
            build_mini(path)
            made[name] = Processor.from_pretrained(path), Whole(path)
        else:
            made[name] = templates.checkpoint(path, getattr(templates, name.upper())), Whole(path)
    return made


def offered(schemas: list[dict[str, Any]]) -> dict[str, Tool]:
    """Tools of these schemas, none of which runs here."""

    def made(schema: dict[str, Any]) -> Tool:
        class Offered(Tool):
            name, description, parameters = (schema["function"][key] for key in ("name", "description", "parameters"))

            def run(self, arguments: Any, images: Any) -> ToolResult:
                raise NotImplementedError

        return Offered()

    return {schema["function"]["name"]: made(schema) for schema in schemas}


LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0")
TEXT = st.one_of(
    st.text(LETTERS, max_size=20),
    st.lists(
        st.sampled_from(
            ["\n\n", "\n", " ", "  ", "é", "e\u0301", "漢字", "\U0001f600", "42", "name", '"}}', ".\n\n", "<", "|"]
        ),
        max_size=12,
    ).map("".join),
    st.sampled_from(["x " * 2000, "\n" * 300, "漢" * 500]),
).filter(lambda text: not re.search(r"</?(?:think|tool_call|tool_response)>|<\|", text))


def thought(text: str) -> str:
    """What a canonical thought is: not empty, without line ends at its edges, none of which follow leading spaces."""
    return f"So{text}".rstrip("\n") if text else "So."


SCHEMAS = st.lists(
    st.builds(
        lambda name, words: {
            "type": "function",
            "function": {
                "name": name,
                "description": words,
                "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": words}}},
            },
        },
        st.text("abcdefg_-", min_size=3, max_size=12),
        TEXT,
    ),
    max_size=4,
    unique_by=lambda schema: schema["function"]["name"],
)
ARGUMENTS = st.dictionaries(
    st.text("xyz", min_size=1, max_size=3), st.one_of(TEXT, st.integers(), st.booleans()), max_size=3
)
PART = st.one_of(st.just("image"), TEXT)
SIZE = st.tuples(st.integers(8, 300), st.integers(8, 300))
RESPONSE = st.tuples(TEXT, st.lists(SIZE, max_size=2))
TURN = st.tuples(TEXT, TEXT, st.lists(st.tuples(st.integers(0, 3), ARGUMENTS, RESPONSE), min_size=1, max_size=3))
EARLIER = st.tuples(st.lists(PART, min_size=1, max_size=3), TEXT, TEXT)


def content(parts: list[str], sizes: Any, images: list[Image.Image]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for part in parts:
        if part == "image":
            images.append(Image.new("RGB", next(sizes)))
            out.append({"type": "image"})
        else:
            out.append({"type": "text", "text": part})
    return out


@pytest.mark.parametrize("family", FAMILIES)
@settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    schemas=SCHEMAS,
    system=st.none() | TEXT,
    earlier=st.lists(EARLIER, max_size=2),
    question=st.lists(PART, min_size=1, max_size=4),
    turns=st.lists(TURN, max_size=3),
    sizes=st.lists(SIZE, min_size=20, max_size=20),
)
def test_what_is_appended_is_the_whole(
    families: dict[str, tuple[Processor, Whole]],
    family: str,
    schemas: list[dict[str, Any]],
    system: str | None,
    earlier: list[tuple[list[str], str, str]],
    question: list[str],
    turns: list[Any],
    sizes: list[tuple[int, int]],
) -> None:
    processor, whole = families[family]
    conversation = Conversation(processor, offered(schemas))
    images: list[Image.Image] = []
    left = iter(sizes)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    for asked, thinking, answer in earlier:  # some datasets keep the thoughts of earlier turns in the text
        said = f"<think>\n{thought(thinking)}\n</think>\n\n{answer}" if family != "instruct" else answer
        messages += [{"role": "user", "content": content(asked, left, images)}, {"role": "assistant", "content": said}]
    messages.append({"role": "user", "content": content(question, left, images)})
    tokens = conversation.prompt(messages, [processor.image(image) for image in images])
    assert tokens == whole.tokens(messages, schemas, images)
    if family != "instruct":
        assert processor.encode("<think>")[0] not in tokens[:-2], "a thought of an earlier turn"
    if not schemas:
        return
    for thinking, text, calls in turns:
        made = [
            {"name": schemas[number % len(schemas)]["function"]["name"], "arguments": given}
            for number, given, _ in calls
        ]
        message, sampled = said_in_a_turn(family, thinking, text, made)
        ids = processor.encode(sampled)
        parsed = conversation.calls(ids)
        assert [(call.name, call.error) for call in parsed] == [(call["name"], None) for call in made]
        assert [composed(call.arguments) for call in parsed] == [composed(call["arguments"]) for call in made]
        results = [
            ToolResult(True, text, [Image.new("RGB", size) for size in shapes]) for _, _, (text, shapes) in calls
        ]
        shown = [image for result in results for image in result.images]
        tokens += ids + conversation.observation(results, [processor.image(image) for image in shown])
        images += shown
        parts = [
            [{"type": "text", "text": result.text}, *[{"type": "image"}] * len(result.images)] for result in results
        ]
        messages += [message, *({"role": "tool", "content": part} for part in parts)]
        assert tokens == whole.tokens(messages, schemas, images)


def composed(arguments: Any) -> Any:
    """As Qwen's tokenizer writes letters (NFC)."""
    return json.loads(unicodedata.normalize("NFC", json.dumps(arguments, ensure_ascii=False)))


def said_in_a_turn(family: str, thinking: str, text: str, calls: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """A turn as a message, and as the model samples it when it writes as its template does."""
    text = thought(text) if family == "instruct" else text.lstrip("\n")
    blocks = "\n".join(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls)
    message = {"role": "assistant", "content": text, "tool_calls": [{"type": "function", "function": c} for c in calls]}
    sampled = f"{text}{chr(10) if text else ''}{blocks}<|im_end|>"
    if family == "instruct":
        return message, sampled
    return {**message, "reasoning_content": thought(thinking)}, f"{thought(thinking)}\n</think>\n\n{sampled}"

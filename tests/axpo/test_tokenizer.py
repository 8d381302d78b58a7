"""The embedded models' directories: what transformers makes of it, lossless tokens, and the template's rules."""

import filecmp
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from axpo.tasks.build_mini import build_mini, build_suite
from axpo.tasks.mini_tokenizer import mini_vocabulary
from axpo.tasks.scenes import ASSETS, COLOURS
from axpo.tasks.suite_tokenizer import suite_vocabulary
from axpo.tasks.teacher import COORDINATES
from axpo.tasks.tokenizer import SPECIAL, TAGS
from axpo.tools.image_zoom_in import ImageZoomIn

VOCABULARIES = {"mini": mini_vocabulary(), "suite/base": suite_vocabulary()}
TOOLS = [ImageZoomIn().schema]
ASK = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What digit is on the red tile?"}]}
CALL = {
    "role": "assistant",
    "reasoning_content": "Small.",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "function": {"name": "image_zoom_in", "arguments": {"label": "x", "bbox_2d": [0, 0, 1, 1]}},
        }
    ],
}
CALL_TEXT = '<tool_call>\n{"name": "image_zoom_in", "arguments": {"label": "x", "bbox_2d": [0, 0, 1, 1]}}\n</tool_call>'
RESPONSE = {"role": "tool", "content": [{"type": "image"}]}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module", params=sorted(VOCABULARIES))
def name(request: pytest.FixtureRequest) -> str:
    """Of an embedded model: every test is about each."""
    return request.param


@pytest.fixture(scope="module")
def built(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built")
    {"mini": build_mini, "suite/base": build_suite}[name](out)
    return out


@pytest.fixture(scope="module")
def tokenizer(built: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(built)


def render(tokenizer: PreTrainedTokenizerFast, messages: list, **rest) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **rest)  # type: ignore[return-value]


def test_the_committed_directory_is_what_the_program_writes(name: str, built: Path) -> None:
    files = sorted(path.name for path in built.iterdir() if path.suffix != ".safetensors")
    match, mismatch, errors = filecmp.cmpfiles(built, ASSETS / name, files, shallow=False)
    assert (sorted(match), mismatch, errors) == (files, [], []), "run `make mini` and `make suite`"


def test_tags_are_single_tokens(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = VOCABULARIES[name]
    for token in vocabulary.added:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1, token
    specials = set(tokenizer.all_special_tokens)
    assert specials & set(TAGS + vocabulary.phrases) == set()  # decoding without special tokens keeps calls, thoughts
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode("".join(SPECIAL)), skip_special_tokens=True) == ""


def test_what_the_task_says_is_short(tokenizer: PreTrainedTokenizerFast) -> None:
    for number in COORDINATES:
        for text in (f"[{number}, ", f", {number}]"):
            tokens = [tokenizer.decode([token]).strip() for token in tokenizer.encode(text)]
            assert str(number) in tokens, tokens
    for word in [*COLOURS, *(f" {colour}" for colour in COLOURS), " small", " large", *"0123456789"]:
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1, word
    prompt = render(tokenizer, [ASK], tools=TOOLS, add_generation_prompt=True)
    assert len(tokenizer.encode(prompt)) + 15 <= 60  # 16 image tokens
    assert 400 <= len(tokenizer) <= 800


@given(
    st.text()
    | st.lists(st.sampled_from([*VOCABULARIES["suite/base"].added, "\n", " ", "red", "312", "é", "\U0001f600"])).map(
        "".join
    )
)
@settings(max_examples=300, deadline=None)
def test_any_string_survives(text: str) -> None:
    for tokenizer in _loaded():
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@given(
    st.lists(
        st.sampled_from(
            ["<think>", "\n", "\n</think>\n\n", "<|im_end|>", "\n<|im_start|>user\n", "<tool_call>\n", '"}}\n']
        )
    )
)
@settings(max_examples=100, deadline=None)
def test_turns_are_encoded_alike_apart_and_together(parts: list[str]) -> None:
    # The loop appends tokens, never text: what it appends must be what the whole conversation would have been.
    parts = [part for pair in zip(parts, ["a"] * len(parts), strict=True) for part in pair]
    for tokenizer in _loaded():
        apart = [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False)]
        assert tokenizer.encode("".join(parts), add_special_tokens=False) == apart


@cache
def _loaded() -> list[PreTrainedTokenizerFast]:
    return [AutoTokenizer.from_pretrained(ASSETS / name) for name in VOCABULARIES]


def test_prompt_has_the_tools_and_opens_the_thinking(tokenizer: PreTrainedTokenizerFast) -> None:
    text = render(tokenizer, [ASK], tools=TOOLS, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n# Tools\n\n")
    assert f"<tools>\n{json.dumps(TOOLS[0])}\n</tools>" in text
    assert text.endswith(
        f"<|im_end|>\n<|im_start|>user\n{IMAGE}What digit is on the red tile?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    two = render(tokenizer, [{"role": "system", "content": "Be brief."}, ASK], tools=TOOLS * 2)
    assert two.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\n")
    assert f"{json.dumps(TOOLS[0])}\n{json.dumps(TOOLS[0])}\n</tools>" in two
    assert two.count("<|im_start|>system") == 1


def test_without_tools_and_system_message_there_is_no_system_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    assert render(tokenizer, [ASK]).startswith("<|im_start|>user\n")
    plain = render(tokenizer, [{"role": "system", "content": "Be brief."}, ASK])
    assert plain.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_calls_and_responses(tokenizer: PreTrainedTokenizerFast) -> None:
    final = {"role": "assistant", "reasoning_content": "Seen.", "content": r"<answer>\boxed{7}</answer>"}
    text = render(tokenizer, [ASK, CALL, RESPONSE, final], tools=TOOLS)
    assert text.endswith(
        f"<|im_start|>assistant\n<think>\nSmall.\n</think>\n\n{CALL_TEXT}<|im_end|>\n"
        f"<|im_start|>user\n<tool_response>\n{IMAGE}\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nSeen.\n</think>\n\n<answer>\\boxed{7}</answer><|im_end|>\n"
    )


def test_consecutive_responses_share_a_turn_and_calls_have_a_block_each(tokenizer: PreTrainedTokenizerFast) -> None:
    double = CALL | {"tool_calls": CALL["tool_calls"] * 2}
    text = render(tokenizer, [ASK, double, RESPONSE, RESPONSE | {"content": "Error: x"}], add_generation_prompt=True)
    assert f"{CALL_TEXT}\n{CALL_TEXT}<|im_end|>" in text
    assert text.endswith(
        f"<|im_start|>user\n<tool_response>\n{IMAGE}\n</tool_response>\n"
        "<tool_response>\nError: x\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_text_before_a_call_is_separated_from_it(tokenizer: PreTrainedTokenizerFast) -> None:
    text = render(tokenizer, [ASK, CALL | {"content": "I look."}])
    assert f"</think>\n\nI look.\n{CALL_TEXT}<|im_end|>" in text


def test_reasoning_is_kept_after_the_last_question_only(tokenizer: PreTrainedTokenizerFast) -> None:
    answer = {"role": "assistant", "reasoning_content": "Old thought.", "content": "Seven."}
    again = {"role": "user", "content": "And the blue one?"}
    text = render(tokenizer, [ASK, CALL, RESPONSE, answer, again, CALL, RESPONSE], add_generation_prompt=True)
    assert "Old thought." not in text and text.count("Small.") == 1
    assert "<|im_start|>assistant\nSeven.<|im_end|>" in text
    # A tool response that a user turn carries as text is no question.
    wrapped = {"role": "user", "content": "<tool_response>\nfound\n</tool_response>"}
    assert "Small." in render(tokenizer, [ASK, CALL, wrapped])


def test_reasoning_may_come_inside_the_content(tokenizer: PreTrainedTokenizerFast) -> None:
    apart = {"role": "assistant", "reasoning_content": "Why.", "content": "Seven."}
    inside = {"role": "assistant", "content": "<think>\nWhy.\n</think>\n\nSeven."}
    assert render(tokenizer, [ASK, apart]) == render(tokenizer, [ASK, inside])


def test_more_turns_only_append(tokenizer: PreTrainedTokenizerFast) -> None:
    final = {"role": "assistant", "reasoning_content": "Seen.", "content": "Seven."}
    messages = [ASK, CALL, RESPONSE, CALL, RESPONSE, final]
    for end in (1, 3, 5):
        prompt = render(tokenizer, messages[:end], tools=TOOLS, add_generation_prompt=True)
        assert render(tokenizer, messages, tools=TOOLS).startswith(prompt)


@pytest.mark.parametrize("size", [(128, 128), (32, 32), (24, 40), (128, 16), (1, 1), (900, 700)])
def test_image_processor_brings_every_image_to_the_overviews_pixels(built: Path, size: tuple[int, int]) -> None:
    processor = AutoImageProcessor.from_pretrained(built)
    assert type(processor).__name__ == "Qwen2VLImageProcessorPil"
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    batch = processor(images=[Image.fromarray(pixels)], return_tensors="np")
    _, height, width = batch["image_grid_thw"][0]
    assert height % 2 == 0 and width % 2 == 0
    assert 8 <= height * width // 4 <= 24, "an image is about 16 tokens"
    assert batch["pixel_values"].shape == (height * width, 3 * 2 * 4 * 4)
    if size[0] == size[1]:
        assert (height, width) == (8, 8)

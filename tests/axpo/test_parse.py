"""Tool calls among sampled tokens: where they begin and end, and every way in which one is malformed."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from axpo.tasks.build_mini import build_mini
from axpo.tools.parse import Markup, ParsedCall, parse_calls

OPEN, CLOSE = "<tool_call>", "</tool_call>"
GOOD = '{"name": "image_zoom_in", "arguments": {"label": "red tile", "bbox_2d": [0, 0, 125, 250]}}'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    out: Path = tmp_path_factory.mktemp("mini")
    build_mini(out)
    return AutoTokenizer.from_pretrained(out)


def parse(tokenizer: PreTrainedTokenizerFast, text: str, **rest) -> tuple[list[int], list[ParsedCall]]:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    stop = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    rest = {"known": ["image_zoom_in"], "stop": stop} | rest
    return tokens, parse_calls(tokens, Markup.of(tokenizer), tokenizer.decode, **rest)


def test_a_call_after_the_thinking(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens, calls = parse(tokenizer, f"It is small.\n</think>\n\n{OPEN}\n{GOOD}\n{CLOSE}<|im_end|>")
    assert [(c.name, c.arguments, c.error) for c in calls] == [
        ("image_zoom_in", {"label": "red tile", "bbox_2d": [0, 0, 125, 250]}, None)
    ]
    assert tokenizer.decode(tokens[calls[0].start : calls[0].end]) == f"{OPEN}\n{GOOD}\n{CLOSE}"


def test_calls_in_the_thinking_do_not_count(tokenizer: PreTrainedTokenizerFast) -> None:
    assert parse(tokenizer, f"maybe {OPEN}{GOOD}{CLOSE}")[1] == []
    assert parse(tokenizer, f"{OPEN}{GOOD}{CLOSE}\n</think>\n\ndone")[1] == []
    _, calls = parse(tokenizer, f"{OPEN}\n</think>\n\n{OPEN}{GOOD}{CLOSE}")
    assert [c.error for c in calls] == [None]  # one opened in the thinking does not swallow the real one
    assert parse(tokenizer, f"a</think>b<think>{OPEN}{GOOD}{CLOSE}</think>")[1] == []
    assert len(parse(tokenizer, f"{OPEN}{GOOD}{CLOSE}", thinking=False)[1]) == 1


def test_letters_that_spell_the_tag_are_no_call(tokenizer: PreTrainedTokenizerFast) -> None:
    letters = [token for letter in f"{OPEN}{GOOD}{CLOSE}" for token in tokenizer.encode(letter)]
    tokens = tokenizer.encode("</think>") + letters
    assert OPEN in tokenizer.decode(tokens)
    assert parse_calls(tokens, Markup.of(tokenizer), tokenizer.decode) == []


def test_several_calls_in_a_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = GOOD.replace("}}", "}")
    tokens, calls = parse(tokenizer, f"</think>\n\n{OPEN}{GOOD}{CLOSE}\n{OPEN}{bad}{CLOSE}\n{OPEN}{GOOD}{CLOSE}")
    assert [c.error is None for c in calls] == [True, False, True]
    for call, content in zip(calls, (GOOD, bad, GOOD), strict=True):
        assert tokenizer.decode(tokens[call.start : call.end]) == f"{OPEN}{content}{CLOSE}"


def test_thinking_tags_inside_a_call_are_part_of_it(tokenizer: PreTrainedTokenizerFast) -> None:
    _, calls = parse(tokenizer, f"</think>{OPEN}<think>{GOOD}{CLOSE}\n{OPEN}{GOOD}{CLOSE}")
    assert [c.error is None for c in calls] == [False, True]  # it does not open a thought that hides the next call


def test_an_unclosed_call_reaches_to_the_next_or_to_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens, calls = parse(tokenizer, f"</think>\n\n{OPEN}{GOOD}\n{OPEN}{GOOD}{CLOSE}")
    assert [c.error is None for c in calls] == [False, True]
    assert calls[0].end == calls[1].start
    tokens, calls = parse(tokenizer, f"</think>\n\n{OPEN}{GOOD}<|im_end|>")
    assert "is not closed" in str(calls[0].error)
    assert calls[0].end == len(tokens) - 1  # the end of the turn is not part of it
    assert parse(tokenizer, f"</think>{OPEN}")[1][0].start == 1
    assert parse(tokenizer, f"</think><|im_end|>{OPEN}{GOOD}{CLOSE}")[1] == []
    assert parse(tokenizer, f"</think>{CLOSE}")[1] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ('{"name": "image_zoom_in"', "not valid JSON"),
        (GOOD + "}", "not valid JSON"),
        ("image_zoom_in(0, 0, 1, 1)", "not valid JSON"),
        ('{"name": "image_zoom_in", "arguments": {"bbox_2d": [NaN]}}', "NaN is not a number"),
        ('{"name": "image_zoom_in", "arguments": {"bbox_2d": [0, 0, 1e999, 1]}}', "1e999 is too large"),
        ('{"name": "image_zoom_in", "arguments": {"label": "\\ud800"}}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "not valid JSON"),
        ("[1, 2]", "is a JSON array; it must be an object"),
        ('"image_zoom_in"', "is a JSON string; it must be an object"),
        ("null", "is a JSON null"),
        ("true", "is a JSON boolean"),
        ("7", "is a JSON number"),
        ('{"arguments": {}}', "has no name"),
        ('{"name": 3, "arguments": {}}', "has a number as its name"),
        ('{"name": "", "arguments": {}}', "has a string as its name"),
        ('{"name": "zoom", "arguments": {}}', "there is no tool 'zoom'; there is: image_zoom_in"),
        ('{"name": "image_zoom_in"}', "the arguments of image_zoom_in are missing"),
        ('{"name": "image_zoom_in", "arguments": "{}"}', "the arguments of image_zoom_in are a JSON string"),
        ('{"name": "image_zoom_in", "arguments": [1]}', "are a JSON array"),
    ],
)
def test_every_malformed_call_says_what_was_wrong(content: str, message: str) -> None:
    # Characters as tokens: the text of a call need not be one that the mini tokenizer can afford.
    markup = Markup(tool_call=1, tool_call_end=2, think=3, think_end=4)
    tokens = [4, 1, *(10 + ord(letter) for letter in content), 2]
    calls = parse_calls(tokens, markup, lambda ids: "".join(chr(i - 10) for i in ids), ["image_zoom_in"])
    assert len(calls) == 1
    assert message in str(calls[0].error)
    assert (calls[0].start, calls[0].end) == (1, len(tokens))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    name=st.text(min_size=1),
    arguments=st.dictionaries(st.text(), json_values, max_size=4),
    indent=st.none() | st.just(2),
)
@settings(max_examples=100, deadline=None)
def test_any_call_written_as_json_is_read_back(name: str, arguments: dict, indent: int | None) -> None:
    content = json.dumps({"name": name, "arguments": arguments}, indent=indent)
    markup = Markup(tool_call=1, tool_call_end=2, think=3, think_end=4)
    tokens = [*b"thought", 4, 1, *(10 + ord(letter) for letter in content), 2]
    tokens = [token + 200 if i < 7 else token for i, token in enumerate(tokens)]
    (call,) = parse_calls(tokens, markup, lambda ids: "".join(chr(i - 10) for i in ids))
    assert (call.name, call.arguments, call.error) == (name, arguments, None)


@given(st.lists(st.integers(0, 8), max_size=40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_tokens_give_ordered_spans_that_begin_at_an_opening_tag(tokens: list[int], thinking: bool) -> None:
    markup = Markup(tool_call=1, tool_call_end=2, think=3, think_end=4)
    calls = parse_calls(tokens, markup, lambda ids: "".join("abc{}[]"[i % 7] for i in ids), thinking=thinking, stop=[8])
    limit = tokens.index(8) if 8 in tokens else len(tokens)
    assert all(a.end <= b.start for a, b in pairwise(calls))
    for call in calls:
        assert tokens[call.start] == 1 and call.start < call.end <= limit
        closed = tokens[call.end - 1] == 2 and call.end - call.start > 1
        assert closed or "is not closed" in str(call.error)


def test_a_tokenizer_without_the_tags_is_refused() -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[], unk_token="a")))
    with pytest.raises(ValueError, match=r"<tool_call> is .* tokens of this tokenizer"):
        Markup.of(plain)

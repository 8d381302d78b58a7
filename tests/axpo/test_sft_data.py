"""Conversations from a file: the tokens of a rollout, only the assistant's words trained, every mistake named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from axpo.cli import resolve
from axpo.config import SftConfig
from axpo.conversation import Conversation
from axpo.data import DataError, Rows
from axpo.paths import model_directory
from axpo.sft_data import SftData
from axpo.tasks.conversations import conversation_row
from axpo.tasks.mini import MiniTask
from axpo.tasks.teacher import STYLES, sft_row, teacher
from axpo.tools import get_tools
from engine import Processor

SOURCE = model_directory("mini")
SEED = int(np.random.default_rng().integers(2**32))


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(SOURCE)


def said(tokens: list[int], mask: list[int], processor: Processor) -> list[str]:
    """The texts of the trained turns, without <|im_end|>."""
    edges = np.flatnonzero(np.diff([0, *mask, 0])).tolist()
    turns = zip(edges[::2], edges[1::2], strict=True)
    return [processor.decode(tokens[start:end]).removesuffix("<|im_end|>") for start, end in turns]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_rows_are_token_for_token_what_the_mini_teacher_makes(tmp_path: Path, processor: Processor):
    task, rows, wanted = MiniTask(), [], []
    style = STYLES["teacher"]
    for number, index in enumerate(np.random.default_rng(SEED).integers(task.size("train"), size=8)):
        question = task.question("train", int(index))
        expected = sft_row(question, np.random.default_rng(number), processor, style)
        random = np.random.default_rng(number)
        random.random()  # as sft_row draws whether to describe
        crops = [m["content"] for m in teacher(question, random, style) if m["role"] == "tool"]
        pictures = [*question.images, *(part["image"] for content in crops for part in content)]
        for place, picture in enumerate(pictures):
            picture.save(tmp_path / f"{number}_{place}.png")
        content = [
            {**question.messages[0]["content"][0], "image": f"{number}_0.png"},
            question.messages[0]["content"][1],
        ]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        for turn, text in enumerate(said(expected.tokens, expected.loss_mask, processor)):
            if turn:
                shown = [{"type": "image", "image": f"{number}_{turn}.png"}]
                messages.append({"role": "tool", "content": shown})
            messages.append({"role": "assistant", "content": f"<think>\n{text}" if number % 2 else text})
        rows.append({"id": f"r{number}", "messages": messages})
        wanted.append(expected)
    assert max(len(row["messages"]) for row in rows) == 4, f"seed {SEED}: no row uses the tool"
    file = Rows(write(tmp_path / "rows.jsonl", rows))
    conversation = Conversation(processor, get_tools(["image_zoom_in"]))
    for number, expected in enumerate(wanted):
        row = conversation_row(file[number], conversation)
        length = len(row.tokens)
        assert row.tokens == expected.tokens[:length], f"seed {SEED}, row {number}"
        assert row.loss_mask == expected.loss_mask[:length]
        assert processor.decode(expected.tokens[length:]) == "\n", "which the template writes behind the last turn"
        assert [image.key for image in row.images] == [image.key for image in expected.images]


def test_every_example_once_an_epoch_whatever_the_ranks(tmp_path: Path):
    rows = [
        {
            "id": f"r{i}",
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"{i}</think>"}],
        }
        for i in range(6)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    options = [f"--data.path={path}", "--data.task=jsonl", "--sft.batch_size=2"]
    config = resolve(SftConfig, options, recipe="mini-sft")

    def labels(rank: int, world: int) -> list[list[tuple[int, ...]]]:
        data = SftData(SOURCE, config, rank, world)
        return [[tuple(tree.labels.tolist()) for tree in data.batch(step)] for step in (1, 2, 3, 4)]

    alone, first, second = labels(0, 1), labels(0, 2), labels(1, 2)
    assert len({turn for step in alone[:3] for turn in step}) == 6, "three steps of two are an epoch of six"
    assert alone == [[*a, *b] for a, b in zip(first, second, strict=True)]


def test_held_out_examples_are_never_trained_on(tmp_path: Path):
    talk = [{"role": "user", "content": "?"}]
    rows = [{"id": f"r{i}", "messages": [*talk, {"role": "assistant", "content": f"{i}</think>"}]} for i in range(6)]
    options = [f"--data.path={write(tmp_path / 'rows.jsonl', rows)}", "--data.task=jsonl", "--sft.batch_size=2"]

    def labels(trees: list[Any]) -> set[tuple[int, ...]]:
        return {tuple(tree.labels.tolist()) for tree in trees}

    config = resolve(SftConfig, [*options, "--sft.heldout_examples=2"], recipe="mini-sft")
    data, other = (SftData(SOURCE, config, rank, 2) for rank in (0, 1))
    assert len(data) == 4
    heldout = labels([*data.heldout(), *other.heldout()])
    trained = labels([tree for step in range(1, 9) for part in (data, other) for tree in part.batch(step)])
    assert (len(heldout), len(trained)) == (2, 4) and not heldout & trained
    with pytest.raises(ValueError, match=r"sft\.heldout_examples = 6: there are 6 examples in all"):
        SftData(SOURCE, resolve(SftConfig, [*options, "--sft.heldout_examples=6"], recipe="mini-sft"), 0, 1)


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ("{", r"rows\.jsonl:1: not valid JSON"),
        ({"messages": []}, r"rows\.jsonl:1: id: missing"),
        (
            {"id": "a", "messages": [{"role": "user", "content": "?"}]},
            r"row 'a': answer: missing",
        ),
        ({"id": "a", "messages": [{"role": "assistant", "content": "?"}]}, r"system and user come before"),
        (
            {"id": "a", "messages": [{"role": r, "content": "?"} for r in ("user", "assistant", "user", "assistant")]},
            r"messages\[2\]: role 'user' after the first answer",
        ),
        (
            {"id": "a", "messages": [{"role": r, "content": "?"} for r in ("user", "assistant", "assistant")]},
            r"messages\[2\]: two assistant turns",
        ),
        (
            {
                "id": "a",
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": "nowhere.png"}]},
                    {"role": "assistant", "content": "?"},
                ],
            },
            r"images\[0\]: .*nowhere\.png does not exist",
        ),
        ({"id": "a", "messages": [{"role": "user", "content": 3}]}, r"messages\[0\]\.content = 3"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, row: Any, wrong: str):
    with pytest.raises(DataError, match=wrong):
        Rows(write(tmp_path / "rows.jsonl", [row])).check(conversations=True)


def test_a_row_that_is_too_long(tmp_path: Path):
    row = {"id": "long", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "1" * 99}]}
    path = write(tmp_path / "rows.jsonl", [row])
    options = [f"--data.path={path}", "--data.task=jsonl", "--sft.batch_size=1", "--sft.max_tokens=64"]
    with pytest.raises(ValueError, match=r"row 'long': \d+ tokens, sft.max_tokens is 64"):
        SftData(SOURCE, resolve(SftConfig, options, recipe="mini-sft"), 0, 1).batch(1)

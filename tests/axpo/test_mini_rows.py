"""Teacher's rows token by token, and where in the photographs the scenes of each split come from."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from axpo.tasks import Question
from axpo.tasks.build_mini import build_mini
from axpo.tasks.mini import MiniTask
from axpo.tasks.scenes import SIDE, TRAIN_COLUMNS, photographs
from axpo.tasks.teacher import COORDINATES, STYLES, TEACHER, sft_row, teacher
from axpo.tools.image_zoom_in import pixel_box
from engine.processor import Processor

SEED = int(np.random.default_rng().integers(2**32))


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    out: Path = tmp_path_factory.mktemp("mini")
    build_mini(out)
    return Processor.from_pretrained(out)


def questions(count: int) -> list[Question]:
    task = MiniTask()
    return [
        task.question("train", int(i)) for i in np.random.default_rng(SEED).integers(task.size("train"), size=count)
    ]


def segments(mask: list[int]) -> list[tuple[int, int]]:
    """[start, end) of every run of ones."""
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_mask_covers_exactly_the_assistants_words(processor: Processor, share: float) -> None:
    style = replace(TEACHER, tool_hard=share, tool_easy=share, describe=0.0)
    for number, question in enumerate(questions(15)):
        row = sft_row(question, np.random.default_rng([SEED, number]), processor, style)
        rng = np.random.default_rng([SEED, number])
        rng.random()  # whether to describe
        messages = teacher(question, rng, style)
        expected = []
        for message in messages:
            if message["role"] == "assistant":
                calls = [call["function"] for call in message.get("tool_calls", ())]
                texts = [
                    f'<tool_call>\n{{"name": "{c["name"]}", "arguments": {{"label": "{c["arguments"]["label"]}", '
                    f'"bbox_2d": {c["arguments"]["bbox_2d"]}}}}}\n</tool_call>'
                    for c in calls
                ]
                body = "\n".join(texts) or message["content"]
                expected.append(f"{message['reasoning_content']}\n</think>\n\n{body}<|im_end|>")
        runs = segments(row.loss_mask)
        assert [processor.decode(row.tokens[a:b]) for a, b in runs] == expected, f"seed {SEED}, row {number}"
        for start, _ in runs:
            assert processor.decode(row.tokens[:start]).endswith("<|im_start|>assistant\n<think>\n")
        assert len(runs) == len(row.images) == 1 + int(share)
        for start, end in runs[:-1]:
            numbers = re.findall(r'"bbox_2d": \[([^\]]+)\]', processor.decode(row.tokens[start:end]))
            assert {int(n) for n in numbers[0].split(",")} <= set(COORDINATES)


def labels_expected(question: Question, view: tuple[int, int, int, int], grid: int, subdivision: int = 24):
    """For every cell of a view: (tile with the largest part of it or None, that part), counted on a fine raster."""
    fine = grid * subdivision
    x = view[0] + (np.arange(fine) + 0.5) * (view[2] - view[0]) / fine
    y = view[1] + (np.arange(fine) + 0.5) * (view[3] - view[1]) / fine
    for cell in range(grid * grid):
        row, column = divmod(cell, grid)
        cx = x[column * subdivision : (column + 1) * subdivision]
        cy = y[row * subdivision : (row + 1) * subdivision]
        parts = []
        for tile in question.meta["tiles"]:
            x1, y1, x2, y2 = tile["box"]
            parts.append(((cx >= x1) & (cx < x2)).mean() * ((cy >= y1) & (cy < y2)).mean())
        best = int(np.argmax(parts))
        yield question.meta["tiles"][best], parts[best], sorted(parts)[-2]


@pytest.mark.parametrize("name", sorted(STYLES))
def test_every_image_token_is_told_what_it_shows(processor: Processor, name: str) -> None:
    style = replace(STYLES[name], tool_hard=1.0, tool_easy=1.0, describe=0.0)
    checked = digits = 0
    for number, question in enumerate(questions(15)):
        row = sft_row(question, np.random.default_rng([SEED, number]), processor, style)
        labels: dict[int, list[str]] = {}
        for index, token in row.image_labels:
            labels.setdefault(index, []).append(processor.decode([token]).strip())
        assert sorted(labels) == [i for i, token in enumerate(row.tokens) if token == processor.image_token_id]
        call = re.search(r'"bbox_2d": (\[[^\]]+\])\}\}\n</tool_call>', processor.decode(row.tokens))
        assert call is not None
        box = [int(n) for n in call[1].strip("[]").split(",")]
        views = [(0, 0, SIDE, SIDE), pixel_box(box, (SIDE, SIDE), 32)]
        for span, view in zip(processor.spans(row.tokens, row.images), views, strict=True):
            if span.height != span.width:
                continue  # a crop at the border, of another shape
            zoom = SIDE / (view[2] - view[0])
            for cell, (tile, part, second) in enumerate(labels_expected(question, view, span.width)):
                words = labels[span.start + cell]
                side = (tile["digit_box"][2] - tile["digit_box"][0]) * zoom
                where = f"seed {SEED}, {question.id}, view {view}, cell {cell}: {words}"
                if part < 0.15:
                    assert words == ["no"], where
                elif part > 0.25 and part - second > 0.05:
                    assert words[0] == tile["colour"], where
                    assert words[1:] == ([str(tile["digit"])] if side > 32 else []), where
                    digits += len(words) - 1
                checked += 1
    assert checked >= 15 * 16 and digits > 20


def test_backgrounds_are_cut_from_the_columns_of_their_split() -> None:
    task = MiniTask()
    rng = np.random.default_rng(SEED)
    for split in ("train", "heldout"):
        for index in rng.integers(task.size(split), size=2):
            question = task.question(split, int(index))
            pixels = np.asarray(question.images[0], dtype=np.float32) + 0.5  # they were rounded down
            free = np.ones((SIDE, SIDE), dtype=bool)
            for tile in question.meta["tiles"]:
                x1, y1, x2, y2 = tile["box"]
                free[y1:y2, x1:x2] = False
            ys, xs = np.nonzero(free)
            # The brightest pixels tell most in a dark photograph.
            brightest = np.argsort(pixels[ys, xs].sum(axis=1))[-30:]
            chosen = np.concatenate([brightest, rng.choice(len(ys), size=50, replace=False)])
            match, left = max(find(pixels[ys[chosen], xs[chosen]], ys[chosen], xs[chosen]))
            assert match > 0.995, f"{question.id} is from no photograph: {match}"
            inside = left + SIDE <= TRAIN_COLUMNS if split == "train" else left >= TRAIN_COLUMNS
            assert inside, f"{question.id}: columns {left} to {left + SIDE}"


def find(values: np.ndarray, ys: np.ndarray, xs: np.ndarray):
    """(cosine, left column) of the best place in every photograph, mirrored or not; brightness does not matter."""
    for photo in photographs():
        rows, columns = photo.shape[0] - SIDE + 1, photo.shape[1] - SIDE + 1
        for across in (xs, SIDE - 1 - xs):
            dot, norm = np.zeros((rows, columns)), np.zeros((rows, columns))
            for value, y, x in zip(values, ys, across, strict=True):
                patch = photo[y : y + rows, x : x + columns]
                dot += patch @ value
                norm += (patch**2).sum(axis=2)
            score = dot / np.sqrt(np.maximum(norm, 1e-9) * (values**2).sum())
            best = int(np.argmax(score))
            yield float(score.flat[best]), best % columns

"""The scripted teacher of the mini task: right answers, a quarter of them by a call, with boxes that are imperfect."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from axpo.tasks import Question
from axpo.tasks.mini import ask
from axpo.tasks.scenes import COLOURS, SIDE
from axpo.tools.image_zoom_in import ImageZoomIn, pixel_box

if TYPE_CHECKING:
    from engine.images import ImageInput
    from engine.processor import Processor

GRID = 8  # places are multiples of 1/8 of the image, so that each coordinate is one token
HALF = SIDE // 2
COORDINATES = tuple(round(step * 1000 / GRID) for step in range(GRID + 1))
ZOOM = ImageZoomIn()

_LOOK = "{} {} {} {}"
_ZOOM = (" I zoom in to read it.", " Zooming in will help.")
_SHOWS = "It shows {}."
DESCRIBE = "Describe the tiles."


@dataclass(frozen=True, slots=True)
class Style:
    """How the teacher behaves.

    tool_hard, tool_easy: share of trajectories with a call, where it is needed (a small tile) and where it is not.
    miss: share of calls that are imprecise (a box that is too wide, or beside the tile).
    describe: share of rows that describe the whole scene, or copy a text, instead of answering the question.
    """

    tool_hard: float
    tool_easy: float
    miss: float
    describe: float


PRACTICE = Style(0.6, 0.3, miss=0.0, describe=0.5)
"""Teaches to see: to find tiles, to aim and to read. What a pretrained model can do already."""

CROPS = Style(1.0, 0.2, miss=0.0, describe=0.1)
"""Teaches to read crops."""

TEACHER = Style(0.43, 0.08, miss=0.55, describe=0.0)
"""Gives the SFT model the symptoms that the paper starts from: rare calls, which mostly fail."""

STYLES = {"practice": PRACTICE, "crops": CROPS, "teacher": TEACHER}


@dataclass(frozen=True, slots=True)
class Row:
    """One trajectory to learn from.

    tokens, with images expanded; loss_mask 0/1 of the same length: assistant turns behind the generation prompt,
    through <|im_end|>. image_labels: (index of an image token, token id of what it shows): a second, dense target.
    """

    tokens: list[int]
    loss_mask: list[int]
    images: list["ImageInput"]
    image_labels: list[tuple[int, int]]


def sft_row(
    question: Question,
    rng: np.random.Generator,
    processor: "Processor",
    style: Style,
    schemas: Sequence[dict[str, Any]] = (ZOOM.schema,),
) -> Row:
    """A row for a question about a scene: the teacher's trajectory, or a description; `schemas` are on offer."""
    if rng.random() < style.describe:
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DESCRIBE}]}]
        messages = [*asked, assistant(describe(question.meta["tiles"], rng), "")]
    else:
        messages = [*question.messages, *teacher(question, rng, style)]
    return make_row(messages, question, processor, schemas)


def teacher(question: Question, rng: np.random.Generator, style: Style = TEACHER) -> list[dict[str, Any]]:
    """The messages that continue a mini question to its right answer (thoughts in `reasoning_content`).

    The crop of a call is in the tool message, under "image". The teacher sees more than the student: its answer is
    right also where the student will not be able to read the crop.
    """
    tile = question.meta["tiles"][question.meta["target"]]
    thought = f"{_look(tile)}."
    answer = rf"<answer>\boxed{{{question.answer}}}</answer>"
    if rng.random() >= (style.tool_easy if tile["large"] else style.tool_hard):
        return [assistant(f"{thought} {_SHOWS.format(question.answer)}", answer)]
    arguments = {"label": f"{tile['colour']} tile", "bbox_2d": teacher_box(tile, rng, style)}
    result = ZOOM.call(arguments, question.images)
    if not result.ok:
        raise AssertionError(f"{question.id}: the teacher's own call failed: {result.error}")
    call = {"type": "function", "function": {"name": "image_zoom_in", "arguments": arguments}}
    return [
        assistant(thought + _ZOOM[int(rng.integers(len(_ZOOM)))], "") | {"tool_calls": [call]},
        {"role": "tool", "content": [{"type": "image", "image": crop} for crop in result.images]},
        assistant(_SHOWS.format(question.answer), answer),
    ]


def describe(tiles: list[dict[str, Any]], rng: np.random.Generator) -> str:
    """Every tile of a scene: colour, place, size and, where it can be read, the digit."""
    lines = []
    for index in rng.permutation(len(tiles)):
        tile = tiles[index]
        lines.append(_look(tile) + (f" {tile['digit']}" if tile["large"] else ""))
    return "\n".join(lines)


def teacher_box(tile: dict[str, Any], rng: np.random.Generator, style: Style) -> list[int]:
    """The quarter of the scene with the tile, in thousandths; a miss is the whole width, all of it, or another."""
    left, top = (edge // HALF * HALF for edge in tile["box"][:2])
    right, bottom = left + HALF, top + HALF
    if rng.random() < style.miss:
        kind = int(rng.integers(3))
        if kind < 2:
            left, right = 0, SIDE
        if kind == 1:
            top, bottom = 0, SIDE
        if kind == 2:
            side = int(rng.integers(3))  # of the other three quarters
            left, top = (HALF - left if side != 1 else left), (HALF - top if side != 0 else top)
            right, bottom = left + HALF, top + HALF
    return [round(edge * 1000 / SIDE) for edge in (left, top, right, bottom)]


def tight_box(tile: dict[str, Any]) -> list[int]:
    """The smallest grid box (thousandths) that holds the tile."""
    x1, y1, x2, y2 = np.array(tile["box"]) * GRID / SIDE
    return [COORDINATES[int(edge)] for edge in (np.floor(x1), np.floor(y1), np.ceil(x2), np.ceil(y2))]


def visible_share(inner: tuple[int, int, int, int], outer: Any) -> float:
    """The share of box `inner` that lies in box `outer`."""
    width = max(0.0, min(inner[2], outer[2]) - max(inner[0], outer[0]))
    height = max(0.0, min(inner[3], outer[3]) - max(inner[1], outer[1]))
    return width * height / ((inner[2] - inner[0]) * (inner[3] - inner[1]))


def sentences() -> Iterator[str]:
    """Everything that the teacher, the questions and the tools' errors say: what the tokenizer is trained on."""
    for digit in range(10):
        yield from (DESCRIBE, _SHOWS.format(digit), _SHOWS.format(digit), f"large {digit}")
    for number in COORDINATES:
        yield from [f"red {number} {number} small no"] * 20
    for colour in COLOURS:
        yield ask(colour)
        for large in (False, True):
            look = _look({"colour": colour, "large": large, "box": (0, 0, 1, 1)}) + "."
            for zoom in _ZOOM:
                yield look + zoom
            yield f"{look} {_SHOWS.format('')}"
        yield f'{{"label": "{colour} tile", "bbox_2d": []}}}}'
    for text in (
        "Error: bbox_2d is []: it has no area, x1 must be less than x2 and y1 less than y2",
        "Error: bbox_2d is []: it is outside the image, coordinates go from 0 to 1000",
        "Error: img_idx is 1, but the images are 0 to 0",
        "Error: the tool call is not valid JSON: Expecting value: line 1 column 1 (char 0)",
        "Error: the tool call is not closed: end it with </tool_call>",
        "Error: there is no tool; there is: image_zoom_in",
    ):
        yield from (text, text)


def assistant(thought: str, text: str) -> dict[str, Any]:
    """An assistant's message with its thought."""
    return {"role": "assistant", "reasoning_content": thought, "content": text}


def make_row(
    messages: list[dict[str, Any]], question: Question, processor: "Processor", schemas: Sequence[dict[str, Any]]
) -> Row:
    """The conversation as tokens, with `schemas` on offer; what image tokens show where the question has a scene."""
    crops = [part["image"] for m in messages if m["role"] == "tool" for part in m["content"] if "image" in part]
    images = [processor.image(image) for image in [*question.images, *crops]]
    text = processor.tokenizer.apply_chat_template(messages, tools=list(schemas), tokenize=False)
    tokens = processor.encode(text, images)
    opening = processor.encode("<|im_start|>assistant\n<think>\n")
    end = processor.encode("<|im_end|>")[0]
    mask = [0] * len(tokens)
    for start in range(len(tokens) - len(opening)):
        if tokens[start : start + len(opening)] == opening:
            first = start + len(opening)
            for index in range(first, tokens.index(end, first) + 1):
                mask[index] = 1
    labels = _image_labels(messages, question, processor, tokens, images) if images else []
    return Row(tokens, mask, images, labels)


def _image_labels(
    messages: list[dict[str, Any]],
    question: Question,
    processor: "Processor",
    tokens: list[int],
    images: list["ImageInput"],
) -> list[tuple[int, int]]:
    calls = [call["function"]["arguments"]["bbox_2d"] for m in messages for call in m.get("tool_calls", ())]
    boxes = [(0, 0, SIDE, SIDE)] + [pixel_box(box, (SIDE, SIDE), ZOOM.min_side) for box in calls]
    seen: list[tuple[int, str]] = []
    for span, view in zip(processor.spans(tokens, images), boxes, strict=True):
        for cell in range(span.height * span.width):
            row, column = divmod(cell, span.width)
            width, height = (view[2] - view[0]) / span.width, (view[3] - view[1]) / span.height
            left, top = view[0] + column * width, view[1] + row * height
            words = _seen(question.meta["tiles"], (left, top, left + width, top + height), SIDE / (view[2] - view[0]))
            seen += [(span.start + cell, word) for word in words]
    ids = {word: processor.encode(word)[0] for word in {word for _, word in seen}}
    return [(index, ids[word]) for index, word in seen]


def _seen(tiles: list[dict[str, Any]], cell: tuple[float, float, float, float], zoom: float) -> list[str]:
    """What an image token shows: the colour of the tile that fills most of it, and its digit where that can be read."""
    shares = [visible_share(cell, tile["box"]) for tile in tiles]  # type: ignore[arg-type]
    best = int(np.argmax(shares))
    if shares[best] < 0.2:
        return ["no"]
    readable = (tiles[best]["digit_box"][2] - tiles[best]["digit_box"][0]) * zoom > 32
    return [tiles[best]["colour"]] + ([f" {tiles[best]['digit']}"] if readable else [])


def _look(tile: dict[str, Any]) -> str:
    """Where a tile is (the corner of the grid cell that it begins in) and how large: said right behind its colour.

    A small model learns first what a token can tell from itself: "red" attends to red image tokens.
    """
    x, y, *_ = tight_box(tile)
    return _LOOK.format(tile["colour"], x, y, "large" if tile["large"] else "small")

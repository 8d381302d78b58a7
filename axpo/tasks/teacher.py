"""The scripted teacher of the mini task: correct trajectories, a quarter of them with a call and an imperfect box."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from axpo.tasks import Question
from axpo.tasks.mini import ask
from axpo.tasks.scenes import COLOURS, SIDE
from axpo.tools import get_tools

if TYPE_CHECKING:
    from engine.processor import ImageInput, Processor

GRID = 16  # the teacher's coordinates are multiples of 1/16 of the image, so each is one token
COORDINATES = tuple(round(step * 1000 / GRID) for step in range(GRID + 1))
TOOLS = get_tools(["image_zoom_in"], {"image_zoom_in": {"min_side": 16}})

_OPENINGS = ("I look for the {} tile.", "The question is about the {} tile.", "Let me find the {} tile.")
_SIZES = {False: " It is small.", True: " It is large."}
_PLACE = " It is at {}, {}."
_ZOOM = (" I zoom in to read it.", " Zooming in will help.", " I need a closer look.")
_READ = (" I can read it.", " It can be read from here.")
_SEEN = ("The crop shows it.", "Now I can read it.", "The digit can be read.")


@dataclass(frozen=True, slots=True)
class Style:
    """How the teacher behaves; the defaults give the SFT model the symptoms that the paper starts from.

    tool_small, tool_large: share of trajectories with a call, by the size of the tile asked for.
    centre_noise: standard deviation of the box's centre, in pixels. side: median side of the box over the tile's.
    side_noise: standard deviation of the logarithm of the side. place: share of thoughts without a call that say where
    the tile is (never before a call: there the box itself is the decision).
    """

    tool_small: float = 0.38
    tool_large: float = 0.07
    centre_noise: float = 3.0
    side: float = 2.0
    side_noise: float = 0.35
    place: float = 1.0


DEFAULT = Style()


def teacher(question: Question, rng: np.random.Generator, style: Style = DEFAULT) -> list[dict[str, Any]]:
    """The messages that continue a mini question to its right answer (thoughts in `reasoning_content`).

    The crop of a call is in the tool message, under "image". Boxes are noisy, and kept when a strong reader could still
    read the digit in the crop: the student cannot always.
    """
    tile = question.meta["tiles"][question.meta["target"]]
    thought = _pick(rng, _OPENINGS).format(tile["colour"]) + _SIZES[tile["large"]]
    answer = rf"<answer>\boxed{{{question.answer}}}</answer>"
    if rng.random() >= (style.tool_large if tile["large"] else style.tool_small):
        if rng.random() < style.place:
            x1, y1, x2, y2 = tile["box"]
            thought += _PLACE.format(_coordinate((x1 + x2) / 2), _coordinate((y1 + y2) / 2))
        return [_assistant(thought + _pick(rng, _READ), answer)]
    arguments = {"bbox_2d": noisy_box(tile, rng, style), "label": f"{tile['colour']} tile"}
    result = TOOLS["image_zoom_in"].call(arguments, question.images)
    if not result.ok:
        raise AssertionError(f"{question.id}: the teacher's own call failed: {result.error}")
    call = {"type": "function", "function": {"name": "image_zoom_in", "arguments": arguments}}
    return [
        _assistant(thought + _pick(rng, _ZOOM), "") | {"tool_calls": [call]},
        {"role": "tool", "content": [{"type": "image", "image": crop} for crop in result.images]},
        _assistant(_pick(rng, _SEEN), answer),
    ]


def noisy_box(tile: dict[str, Any], rng: np.random.Generator, style: Style) -> list[int]:
    """A box about the tile in grid coordinates (thousandths), with at least 80 % of the digit inside."""
    x1, y1, x2, y2 = tile["box"]
    for _ in range(1000):
        side = (x2 - x1) * style.side * np.exp(rng.normal(0, style.side_noise))
        cx, cy = rng.normal([(x1 + x2) / 2, (y1 + y2) / 2], style.centre_noise)
        pixels = np.array([cx - side / 2, cy - side / 2, cx + side / 2, cy + side / 2])
        edges = np.clip(np.round(pixels * GRID / SIDE), 0, GRID)
        if visible_share(tile["digit_box"], edges * SIDE / GRID) >= 0.8:
            return [COORDINATES[int(edge)] for edge in edges]
    raise ValueError(f"no box of 1000 shows the digit of {tile}: {style} is too noisy")


def visible_share(inner: tuple[int, int, int, int], outer: Any) -> float:
    """The share of box `inner` that lies in box `outer`."""
    width = max(0.0, min(inner[2], outer[2]) - max(inner[0], outer[0]))
    height = max(0.0, min(inner[3], outer[3]) - max(inner[1], outer[1]))
    return width * height / ((inner[2] - inner[0]) * (inner[3] - inner[1]))


def sft_example(
    question: Question, rng: np.random.Generator, processor: "Processor", style: Style = DEFAULT
) -> tuple[list[int], list[int], list["ImageInput"]]:
    """One row of SFT: (token ids with images expanded, loss mask 0/1 of the same length, images in token order).

    The loss falls on assistant turns after the generation prompt, through <|im_end|>.
    """
    messages = question.messages + teacher(question, rng, style)
    crops: list[Image.Image] = [
        part["image"] for message in messages if message["role"] == "tool" for part in message["content"]
    ]
    images = [processor.image(image) for image in question.images + crops]
    schemas = [tool.schema for tool in TOOLS.values()]
    text = processor.tokenizer.apply_chat_template(messages, tools=schemas, tokenize=False)
    tokens = processor.encode(text, images)
    opening = processor.encode("<|im_start|>assistant\n<think>\n", [])
    end = processor.encode("<|im_end|>", [])[0]
    mask = [0] * len(tokens)
    for start in range(len(tokens) - len(opening)):
        if tokens[start : start + len(opening)] == opening:
            first = start + len(opening)
            for index in range(first, tokens.index(end, first) + 1):
                mask[index] = 1
    return tokens, mask, images


def sentences() -> Iterator[str]:
    """Everything that the teacher, the questions and the tools' errors say: what the tokenizer is trained on."""
    for colour in COLOURS:
        yield ask(colour)
        yield f'{{"label": "{colour} tile"}}'
        for opening in _OPENINGS:
            for size in _SIZES.values():
                for rest in (*_ZOOM, *_READ):
                    yield opening.format(colour) + size + _PLACE.format("", "") + rest
    yield from _SEEN
    for text in (
        "Error: bbox_2d is []: it has no area, x1 must be less than x2 and y1 less than y2",
        "Error: bbox_2d is []: it is outside the image, coordinates go from 0 to 1000",
        "Error: img_idx is 1, but the images are 0 to 0",
        "Error: the tool call is not valid JSON: Expecting value: line 1 column 1 (char 0)",
        "Error: the tool call is not closed: end it with </tool_call>",
        "Error: there is no tool; there is: image_zoom_in",
    ):
        yield from (text, text)


def _assistant(thought: str, text: str) -> dict[str, Any]:
    return {"role": "assistant", "reasoning_content": thought, "content": text}


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _coordinate(pixel: float) -> int:
    return COORDINATES[round(pixel * GRID / SIDE)]

"""A trajectory as a person reads it: what was thought, called, seen and answered, and how each part was credited."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from PIL import Image

from axpo.grading import final_answer
from axpo.report.pictures import CROP_SIDE, Box, Picture, Rect, embed
from axpo.tools import Tool
from axpo.tools.image_zoom_in import RELATIVE, ImageZoomIn
from axpo.trajectory import ToolCall, Trajectory

_LONGEST = 6000  # characters shown of one piece of text
_TURN_HEADER = re.compile(r"\s*<\|im_start\|>(\w+)\n")
_MARKUP = re.compile(r"<\|vision_start\|>.*?<\|vision_end\|>|<\|[a-z_]+\|>", re.DOTALL)
_RESPONSE = re.compile(r"<tool_response>\n?(.*?)\n?(?:</tool_response>|$)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Event:
    """think, say, call or answer. A call has its arguments as `text`, and what came back."""

    kind: Literal["think", "say", "call", "answer"]
    text: str
    name: str = ""
    ok: bool = True
    response: str = ""
    crop: Picture | None = None


@dataclass(frozen=True, slots=True)
class Branch:
    """One ending: of a rollout, of a source as it first went on, or of a resample. advantage: None if not trained."""

    label: str
    right: bool
    note: str
    advantage: float | None
    events: list[Event]
    boxes: list[Box]

    @property
    def used_tool(self) -> bool:
        return any(event.kind == "call" for event in self.events)

    @property
    def brief(self) -> bool:
        """It fits in one line of the page."""
        return not self.used_tool and sum(len(event.text) for event in self.events) + len(self.note) <= 72


@dataclass(frozen=True, slots=True)
class Source:
    """A rollout that was resampled: the fixed prefix, how it first went on, and the resamples; `fork` is where."""

    label: str
    fork: str
    recovered: bool
    confidence: float | None
    advantage: float | None
    prefix: list[Event]
    original: Branch
    resamples: list[Branch] = field(default_factory=list)


def plain_branch(
    trajectory: Trajectory, number: int, images: Sequence[Image.Image], tools: Mapping[str, Tool]
) -> Branch:
    return _branch(trajectory, str(number), 0, images, tools)


def source_branch(
    trajectory: Trajectory,
    number: int,
    resamples: Sequence[Trajectory],
    images: Sequence[Image.Image],
    tools: Mapping[str, Tool],
) -> Source:
    """Splits the source and its resamples at the fork."""
    fork = resamples[0].fork_token or len(trajectory.tokens)
    whole = _branch(trajectory, str(number), fork, images, tools)
    place, at = _fork_event(trajectory, fork, whole.events)
    children = []
    for index, resample in enumerate(resamples):
        child = _branch(resample, f"{number}{_letter(index)}", fork, images, tools)
        children.append(replace(child, events=child.events[_fork_event(resample, fork, child.events)[1] :]))
    return Source(
        label=str(number),
        fork=place,
        confidence=trajectory.confidence,
        recovered=any(child.right for child in children),
        advantage=_advantage(trajectory, 0, fork),
        prefix=whole.events[:at],
        original=replace(whole, events=whole.events[at:]),
        resamples=children,
    )


def _branch(
    trajectory: Trajectory,
    label: str,
    start: int,
    images: Sequence[Image.Image],
    tools: Mapping[str, Tool],
) -> Branch:
    """`start`: the token behind the fork; advantage is of what follows it."""
    advantage = _advantage(trajectory, start, len(trajectory.tokens))
    crops, rects = _replay(trajectory.tool_calls, images, tools)
    boxes = [Box(image, rect, label, trajectory.correct, advantage is None) for image, rect in filter(None, rects)]
    return Branch(label, trajectory.correct, _note(trajectory), advantage, _events(trajectory, crops), boxes)


def _fork_event(trajectory: Trajectory, fork: int, events: Sequence[Event]) -> tuple[str, int]:
    """(the fork in words, how many events lie before it)."""
    calls = [index for index, event in enumerate(events) if event.kind == "call"]
    earlier = sum(call.end <= fork for call in trajectory.tool_calls)
    first = trajectory.first_call
    if fork == trajectory.prompt_len:
        return "at the prompt, which is all that is kept", 0
    if earlier:
        return "behind a tool response", calls[earlier - 1] + 1
    if first is not None and first.start < fork:
        return "at the opening tag of the first call", calls[0] if calls else len(events)
    return "behind the thinking", sum(event.kind == "think" for event in events[:1])


def _advantage(trajectory: Trajectory, start: int, end: int) -> float | None:
    """That of the trained tokens in start..end, which all have the same; None when none is trained."""
    trained = (i for i in range(start, min(end, len(trajectory.tokens))) if trajectory.loss_mask[i])
    first = next(trained, None)
    return None if first is None else trajectory.advantages[first]


def _note(trajectory: Trajectory) -> str:
    if trajectory.status == "answered" and _final(trajectory.text.split("<|im_end|>")) is None:
        return "ended without an answer that can be read"
    return {"answered": "", "turn_limit": "no turn was left", "length": "no token was left"}.get(
        trajectory.status, f"ended by an error ({trajectory.status})"
    )


def _final(pieces: Sequence[str]) -> str | None:
    last = next((piece for piece in reversed(pieces) if piece.strip()), "")
    return final_answer(last, thinking="</think>" in last)


def _events(trajectory: Trajectory, crops: Sequence[Picture | None]) -> list[Event]:
    """The text's turns, with the recorded calls in place of what stands between the tags."""
    events: list[Event] = []
    pieces = trajectory.text.split("<|im_end|>")
    turn, pending = 0, list(zip(trajectory.tool_calls, crops, strict=True))
    for index, piece in enumerate(pieces):
        header = _TURN_HEADER.match(piece)
        if not piece.strip() or (header is not None and header[1] != "assistant"):
            continue
        here = [item for item in pending if item[0].turn == turn]
        turn += 1
        body = piece[header.end() if header else 0 :].removeprefix("<think>\n")
        thought, closed, action = body.partition("</think>")
        if not closed and here:
            thought, action = "", body
        _add(events, "think", thought)
        if here:
            said, *raw = action.split("<tool_call>")
            _add(events, "say", said)
            responses = _RESPONSE.findall(pieces[index + 1]) if index + 1 < len(pieces) else []
            for place, (call, crop) in enumerate(here):
                written = raw[place].partition("</tool_call>")[0] if place < len(raw) else ""
                answered = responses[place] if place < len(responses) else ""
                events.append(_call_event(call, written, answered, crop))
        elif (answer := final_answer(piece, thinking=bool(closed))) is not None:
            _add(events, "say", action.partition("<answer>")[0])
            _add(events, "answer", answer)
        else:
            _add(events, "say", action)
    return events


def _call_event(call: ToolCall, written: str, response: str, crop: Picture | None) -> Event:
    if call.arguments is None:
        text = written
    else:
        text = "  ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())
    back = _clip(_MARKUP.sub("", response)) if call.ok else (call.error or "failed")
    return Event("call", _clip(text), call.name or "unreadable call", call.ok, back, crop)


def _add(events: list[Event], kind: Literal["think", "say", "answer"], text: str) -> None:
    if text := _clip(_MARKUP.sub("", text)):
        events.append(Event(kind, text))


def _clip(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text) - _LONGEST:,} more characters)"


def _replay(
    calls: Sequence[ToolCall], images: Sequence[Image.Image], tools: Mapping[str, Tool]
) -> tuple[list[Picture | None], list[tuple[int, Rect] | None]]:
    """(the crop of each call, its box on a picture of the question). Only image_zoom_in is run again.

    Crops join the images that later calls may refer to. Behind another tool's call they are not known any more.
    """
    seen = list(images)
    frames: list[tuple[int, Rect]] = [(index, (0.0, 0.0, 1.0, 1.0)) for index in range(len(images))]
    crops: list[Picture | None] = []
    rects: list[tuple[int, Rect] | None] = []
    known = bool(images)
    for call in calls:
        tool = tools.get(call.name or "")
        frame = _frame(call, frames) if known and isinstance(tool, ImageZoomIn) else None
        result = tool.call(call.arguments or {}, seen) if frame and tool and call.ok else None
        if result is not None and result.ok:
            seen += result.images
            frames += [frame] * len(result.images) if frame else []
        elif call.ok:
            known = False
        crops.append(embed(result.images[0], CROP_SIDE) if result and result.images else None)
        rects.append(frame)
    return crops, rects


def _frame(call: ToolCall, frames: Sequence[tuple[int, Rect]]) -> tuple[int, Rect] | None:
    """The call's box on the question's own picture, through the crops between; None when there is no such box."""
    arguments = call.arguments or {}
    box, index = arguments.get("bbox_2d"), arguments.get("img_idx", 0)
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(edge, int | float) for edge in box):
        return None
    if not isinstance(index, int) or not 0 <= index < len(frames):
        return None
    left, top, right, bottom = (min(max(edge / RELATIVE, 0.0), 1.0) for edge in box)
    if not (left < right and top < bottom):
        return None
    image, (x, y, x2, y2) = frames[index]
    return image, (x + left * (x2 - x), y + top * (y2 - y), x + right * (x2 - x), y + bottom * (y2 - y))


def _letter(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else f"-{index + 1}"

"""Tool calls that ask for the same, by a mechanical measure (PAPER.md, "Diagnostics": clusters of resampled calls)."""

import ast
import json
import unicodedata
from collections.abc import Sequence
from typing import Any, TypeGuard

from axpo.trajectory import ToolCall, Trajectory

SAME_BOX = 0.5
"""Intersection over union from which on two boxes on one image are the same look."""

_QUOTES = dict.fromkeys(map(ord, "\"'`´“”„‟‘’‚‛«»‹›"))


def call_clusters(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """The trajectories that called a tool behind their fork, grouped by the first such call; largest group first.

    Two calls are linked when tool and normalised arguments are equal, or when both are boxes on one image that overlap
    by SAME_BOX; a cluster is what links connect (single link). Strings are compared without case, quotes and spacing,
    code as its syntax tree, 3 and 3.0 as one number. A malformed call is the text that was sampled.
    """
    calls = [(t, call) for t in trajectories if (call := call_behind_fork(t)) is not None]
    boxes = [_box(call) for _, call in calls]
    keys = [_key(t, call) for t, call in calls]
    cluster = list(range(len(calls)))
    for i in range(len(calls)):
        for j in range(i):
            first, second = boxes[i], boxes[j]
            linked = keys[i] == keys[j]
            if first is not None and second is not None:
                linked = first[0] == second[0] and overlap(first[1], second[1]) >= SAME_BOX
            if linked and cluster[i] != cluster[j]:
                cluster = [cluster[j] if label == cluster[i] else label for label in cluster]
    members: dict[int, list[Trajectory]] = {}
    for label, (trajectory, _) in zip(cluster, calls, strict=True):
        members.setdefault(label, []).append(trajectory)
    return sorted(members.values(), key=len, reverse=True)


def call_behind_fork(trajectory: Trajectory) -> ToolCall | None:
    """The first call that ends behind the trajectory's fork, which is the one that AXPO samples anew."""
    return next((call for call in trajectory.tool_calls if call.end > (trajectory.fork_token or 0)), None)


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom); 0 where either has no area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


def _box(call: ToolCall) -> tuple[tuple[str, str], list[float]] | None:
    """(tool and image, box) of a call whose arguments have a box with an area; what else it says is not compared."""
    box = (call.arguments or {}).get("bbox_2d")
    if call.name is None or not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return None
    if not (box[0] < box[2] and box[1] < box[3]):
        return None
    return (call.name, _plain((call.arguments or {}).get("img_idx", 0))), box


def exact_key(trajectory: Trajectory, call: ToolCall) -> str:
    """Equal for calls of one tool with equal arguments; of a malformed call, what was sampled."""
    if call.name is None or call.arguments is None:
        return repr(trajectory.tokens[call.start : call.end])
    return json.dumps([call.name, call.arguments], sort_keys=True)


def _key(trajectory: Trajectory, call: ToolCall) -> str:
    if call.name is None or call.arguments is None:
        return exact_key(trajectory, call)
    arguments = {k: _code(v) if k == "code" else _plain(v) for k, v in call.arguments.items()}
    return json.dumps([call.name, arguments], sort_keys=True)


def _plain(value: Any) -> str:
    """One spelling of values that mean the same."""
    if isinstance(value, str):
        letters = unicodedata.normalize("NFKC", value).casefold().translate(_QUOTES)
        return " ".join(letters.split())
    if _is_number(value):
        return repr(_simplest(value))
    if isinstance(value, list):
        return json.dumps([_plain(item) for item in value])
    if isinstance(value, dict):
        return json.dumps({name: _plain(item) for name, item in value.items()}, sort_keys=True)
    return repr(value)


def _code(value: Any) -> str:
    """The syntax tree, which has neither comments nor formatting; the plain text of what is no Python."""
    try:
        tree = ast.parse(value)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and _is_number(node.value):
                node.value = _simplest(node.value)
        return ast.dump(tree)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return _plain(value)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _simplest(value: float) -> float:
    """A whole float as the integer that it is."""
    return value if isinstance(value, int) or not value.is_integer() else int(value)

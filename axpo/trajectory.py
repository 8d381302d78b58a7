"""One rollout as it travels: tokens with their roles, sampler's log-probs, tool calls, reward and credit."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np

PROMPT, SAMPLED, OBSERVATION = 0, 1, 2
Status = Literal["answered", "turn_limit", "length", "error"]
_UNSERIALISED = ("images", "positions", "grade_error")
_UNSERIALISED_OF_CALLS = ("seconds", "timed_out")  # the files of two equal runs are equal


@dataclass(slots=True)
class ToolCall:
    """One attempt to call a tool; `start:end` index the trajectory's tokens and span both tags.

    An attempt exists as soon as the opening tag was sampled outside the thinking segment. A malformed call has
    `ok=False` and says why in `error`; one that was never closed ends where its turn's text ends.
    `seconds` (None for a call that reached no tool) and `timed_out` stay in memory.
    """

    name: str | None
    arguments: dict[str, Any] | None
    ok: bool
    error: str | None
    turn: int
    start: int
    end: int
    seconds: float | None = None
    timed_out: bool = False


@dataclass(slots=True)
class Trajectory:
    """A rollout, or a resample that shares its parent's first `fork_token` tokens.

    Arrays have the length of `tokens`. `logprobs` and `entropies` are the sampler's, None where nothing was sampled.
    `loss_mask` (0/1) and `advantages` are filled by `axpo.advantage.assign_credit`.
    `images` (engine.processor.ImageInput, in token order), `positions` (mrope, int64 [3, len]) and `grade_error` (why
    the answer could not be compared) stay in memory.
    """

    step: int
    question_id: str
    group: int
    id: str
    parent: str | None
    fork_token: int | None
    prompt_len: int
    tokens: list[int]
    roles: list[int]
    loss_mask: list[int]
    logprobs: list[float | None]
    entropies: list[float | None]
    advantages: list[float]
    reward: float
    status: Status
    tool_calls: list[ToolCall]
    confidence: float | None
    text: str
    images: list[Any] = field(default_factory=list)
    positions: np.ndarray | None = None
    grade_error: str | None = None

    def __post_init__(self) -> None:
        for name in ("roles", "loss_mask", "logprobs", "entropies", "advantages"):
            if len(getattr(self, name)) != len(self.tokens):
                raise ValueError(
                    f"trajectory {self.id}: {name} has {len(getattr(self, name))} entries for {len(self.tokens)} tokens"
                )
        if (self.parent is None) != (self.fork_token is None):
            raise ValueError(f"trajectory {self.id}: parent {self.parent!r} goes with fork_token {self.fork_token!r}")

    @property
    def used_tool(self) -> bool:
        """At least one call was attempted, well-formed or not (PAPER.md: a malformed call is an ordinary failure)."""
        return bool(self.tool_calls)

    @property
    def first_call(self) -> ToolCall | None:
        return self.tool_calls[0] if self.tool_calls else None

    @property
    def correct(self) -> bool:
        return self.reward > 0

    def to_json(self) -> str:
        """One line of trajectories/step_*.jsonl (DESIGN.md, "A trajectory line")."""
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _UNSERIALISED}
        calls = [asdict(call) for call in self.tool_calls]
        record["tool_calls"] = [{k: v for k, v in c.items() if k not in _UNSERIALISED_OF_CALLS} for c in calls]
        return json.dumps(record, allow_nan=False)  # ASCII: a model may write lone surrogates

    @classmethod
    def from_json(cls, line: str) -> "Trajectory":
        """Inverse of `to_json`, without images and positions; ValueError names a missing or unknown field."""
        record = json.loads(line)
        expected = {f.name for f in fields(cls)} - set(_UNSERIALISED)
        if wrong := expected.symmetric_difference(record):
            raise ValueError(f"trajectory line {record.get('id')!r}: missing or unknown fields {sorted(wrong)}")
        record["tool_calls"] = [ToolCall(**call) for call in record["tool_calls"]]
        return cls(**record)

"""A rollout in progress, and what bounds it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from axpo.grading import Grade
from axpo.tasks import Question
from axpo.tools import Tool, ToolResult
from axpo.trajectory import SAMPLED, Status, ToolCall
from engine import Sequence as EngineSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sampling and stopping of a trajectory; the fields are those of the config's rollout and eval sections.

    max_observation_tokens, max_images: 0 is no limit.
    """

    max_turns: int
    max_new_tokens: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    max_observation_tokens: int = 0
    max_images: int = 0
    tool_timeout_s: float = math.inf


@dataclass(slots=True, eq=False)
class Branch:
    """A rollout in progress: the engine's sequence, and what is known of each of its tokens."""

    id: str
    group: int
    question: Question
    sequence: EngineSequence
    seed: int
    images: list[Image.Image]
    prompt_len: int
    roles: list[int]
    logprobs: list[float | None]
    entropies: list[float | None]
    parent: str | None = None
    fork_token: int | None = None
    turn: int = 0
    turn_start: int = 0
    calls: list[ToolCall] = field(default_factory=list)
    status: Status | None = None
    reward: float = 0.0
    score: float = 0.0
    grade_error: str | None = None
    grading: bool = False
    """Its answer is being compared on a worker thread; then it has ended."""
    observations: list[Sequence[ToolResult]] = field(default_factory=list)
    """What the tools answered, a turn each."""
    sessions: dict[str, Tool] = field(default_factory=dict)
    """The tools with state that it has called; they end with the branch."""
    inherited: Sequence[tuple[ToolCall, ToolResult]] = ()
    """Its source's calls before the fork, in order."""

    @property
    def sampled(self) -> int:
        return self.roles.count(SAMPLED)

    def session(self, tool: Tool) -> Tool:
        """The branch's own instance of a tool. One with state has seen the calls before the fork, none behind it.

        A state cannot be copied (an interpreter's least of all), so those calls are made again, in their order and on
        the images that there were.
        """
        if tool.name in self.sessions:
            return self.sessions[tool.name]
        made = tool.session()
        if made is not tool:
            self.sessions[tool.name] = made
            images = list(self.question.images)
            for call, result in self.inherited:
                if call.name == tool.name and call.arguments is not None:
                    made.call(call.arguments, images)
                images += result.images
        return made

    def take_grade(self, grade: Grade) -> None:
        self.reward, self.score = grade.reward, grade.score
        self.grade_error, self.grading = grade.error, False

    def end_sessions(self) -> None:
        for tool in self.sessions.values():
            tool.close()
        self.sessions.clear()

    def record(self, role: int, logprobs: Sequence[float | None], entropies: Sequence[float | None]) -> None:
        self.roles += [role] * len(logprobs)
        self.logprobs += logprobs
        self.entropies += entropies

"""Limits of what tools may add to a trajectory, at their edges, and tools that misbehave: each costs its call alone."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from axpo.branch import Branch, Limits
from axpo.conversation import Conversation
from axpo.paths import model_directory
from axpo.rollout import Agent
from axpo.tasks import get_task
from axpo.tools import Tool, ToolResult
from axpo.trajectory import OBSERVATION, PROMPT
from engine import LLM, CompletionOutput

LIMITS = Limits(max_turns=3, max_new_tokens=400, max_tokens=900, max_observation_tokens=100, max_images=4)
CALL = '<tool_call>\n{"name": "probe", "arguments": {}}\n</tool_call>'


class Probe(Tool):
    """Does what a test asks for."""

    name = "probe"
    description = "Answers."
    parameters: ClassVar = {"type": "object"}
    inline = True
    does: Callable[[list[Image.Image]], Any] = lambda images: ToolResult(True, "ok")

    def run(self, arguments: Mapping[str, Any], images: list[Image.Image]) -> ToolResult:
        return type(self).does(images)


class Slow(Probe):
    name = "slow"
    inline = False


@pytest.fixture(scope="module")
def agent() -> Agent:
    llm = LLM(model_directory("mini"), dtype=torch.float32, kv_cache_bytes=1 << 26)
    return Agent(llm, Conversation(llm.processor, {"probe": Probe(), "slow": Slow()}), seed=0, tool_workers=2)


@pytest.fixture
def branch(agent: Agent) -> Iterator[Branch]:
    made = fresh(agent)
    yield made
    if not made.sequence.closed:
        agent.llm.abort(made.sequence)
        made.sequence.close()


def fresh(agent: Agent, limits: Limits = LIMITS) -> Branch:
    question = get_task("mini").question("train", 0)
    sequence = agent._open(question, agent.llm.image_inputs(question.images), limits)
    n = len(sequence)
    nothing: list[float | None] = [None] * n
    return Branch(
        "b", 0, question, sequence, 0, list(question.images), n, [PROMPT] * n, nothing, list(nothing), turn_start=n
    )


def turn(agent: Agent, branch: Branch, text: str, limits: Limits = LIMITS, *, ends: bool = True) -> dict:
    """The branch says `text`; its calls are made. Returns what is pending."""
    tokens = agent.conversation.processor.encode(text) + [agent.conversation.end_of_turn] * ends
    branch.sequence.extend(tokens)
    zeros = [0.0] * len(tokens)
    stop = agent.conversation.end_of_turn if ends else None
    pending: dict = {}
    output = CompletionOutput(0, text, tokens, zeros, zeros, "stop" if ends else "length", stop)
    agent._take([(branch, agent._turn(branch, output, limits, pending))], limits)
    return pending


def settle(agent: Agent, pending: dict, limits: Limits = LIMITS) -> None:
    """Waits for what is pending as the loop does."""
    while pending:
        done = agent._finished(pending, limits, wait_for_one=True)
        agent._take([(pending.pop(future)[0], future.result()) for future in done], limits)


def observed(agent: Agent, branch: Branch) -> str:
    start = max(i for i, role in enumerate(branch.roles) if role != OBSERVATION) + 1
    return agent.conversation.processor.decode(branch.sequence.token_ids[start:])


def answer(agent: Agent, branch: Branch, result: Any, calls: int = 1, limits: Limits = LIMITS) -> str:
    """What the model reads when the tool returns `result`."""
    Probe.does = result if callable(result) else lambda images: result
    turn(agent, branch, f"So.\n</think>\n\n{chr(10).join([CALL] * calls)}", limits)
    return observed(agent, branch)


@pytest.mark.parametrize("text", ["word " * 5000, "漢字é" * 3000, "\n" * 9000, "<|im_end|>" * 2000, "x" * 3_000_000])
def test_a_huge_output_is_cut_and_says_so(agent: Agent, branch: Branch, text: str) -> None:
    said = answer(agent, branch, ToolResult(True, text))
    body = said.partition("<tool_response>\n")[2].partition("\n</tool_response>")[0]
    shown, _, note = body.rpartition("\n… cut: ")
    assert text.startswith(shown) and note == f"{len(shown)} of {len(text)} characters are shown"
    assert len(agent.conversation._encode(agent.conversation._quote(shown))) <= LIMITS.max_observation_tokens
    assert len(shown) >= 20 and branch.calls[0].ok and branch.status is None


def test_an_output_of_just_the_limit_is_whole(agent: Agent) -> None:
    text = "red blue " * 40
    tokens = len(agent.conversation.processor.encode_text(text))
    assert agent.conversation.shorten(text, tokens) == text and agent.conversation.shorten(text, 0) == text
    cut = agent.conversation.shorten(text, tokens - 1)
    assert cut != text and "… cut: " in cut


def test_an_observation_that_would_overflow_the_context_ends_the_trajectory(agent: Agent) -> None:
    measure = fresh(agent)
    before = len(measure.sequence)
    answer(agent, measure, ToolResult(True, "x" * 60))
    needed = len(measure.sequence) - before
    agent.llm.abort(measure.sequence)
    measure.sequence.close()
    for room, status in ((needed + 1, None), (needed, "length")):
        one = fresh(agent)
        limits = replace(LIMITS, max_tokens=before + room)
        Probe.does = lambda images: ToolResult(True, "x" * 60)
        turn(agent, one, f"So.\n</think>\n\n{CALL}", limits)
        assert one.status == status, room
        assert len(one.sequence) < limits.max_tokens and len(one.roles) == len(one.sequence)
        assert one.calls[0].ok, "the call was made"
        if status is None:
            agent.llm.abort(one.sequence)
        one.sequence.close()


def test_images_beyond_the_limit_are_left_out_and_the_model_is_told(agent: Agent, branch: Branch) -> None:
    pictures = [Image.new("RGB", (40, 40), (i, 0, 0)) for i in range(5)]
    said = answer(agent, branch, ToolResult(True, "five", pictures))
    assert "five\n(2 images left out: a conversation has at most 4)" in said
    assert len(branch.images) == len(branch.sequence.images) == LIMITS.max_images
    assert branch.images[1:] == pictures[:3], "what a later call can refer to is what was shown"
    agent.llm.abort(branch.sequence)
    said = answer(agent, branch, ToolResult(True, "", pictures[:1]))
    assert "<tool_response>\n(1 images left out" in said and len(branch.images) == LIMITS.max_images


def test_a_question_with_more_images_than_the_limit_is_named(agent: Agent) -> None:
    with pytest.raises(ValueError, match=r"question 'mini/train/0': 1 images, rollout\.max_images is"):
        fresh(agent, replace(LIMITS, max_images=-1))


def bomb(images: list[Image.Image]) -> ToolResult:
    return ToolResult(True, "look", [Image.new("1", (20_000, 20_000))])


def surrogate(images: list[Image.Image]) -> ToolResult:
    return ToolResult(True, "a\ud800b")


def hostile(images: list[Image.Image]) -> ToolResult:
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    raise Unspeakable


def leaves(images: list[Image.Image]) -> ToolResult:
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (bomb, "image 0 of the result is 20000x20000, more than"),
        (ToolResult(True, "", [Image.new("RGB", (0, 9))]), "it has no pixels"),
        (ToolResult(True, "", [Image.new("RGB", (9000, 20))]), "its image cannot be shown"),
        (ToolResult(True, "", ["picture.png"]), "images that are PIL images"),  # type: ignore[list-item]
        (None, "it returned NoneType, not a ToolResult"),
        ("text", "it returned str, not a ToolResult"),
        (ToolResult(True, b"bytes"), "must have text that is a str"),  # type: ignore[arg-type]
        (hostile, "Unspeakable: (its message cannot be shown)"),
        (leaves, "SystemExit: 3"),
    ],
)
def test_a_tool_that_misbehaves_costs_its_call(agent: Agent, branch: Branch, result: Any, told: str) -> None:
    said = answer(agent, branch, result)
    assert told in said and told in (branch.calls[0].error or "") and not branch.calls[0].ok
    assert branch.status is None and len(branch.images) == 1 == len(branch.sequence.images)


def test_half_a_surrogate_pair_is_no_text(agent: Agent, branch: Branch) -> None:
    assert "\na?b\n" in answer(agent, branch, surrogate)


def test_every_call_of_a_turn_is_answered_in_its_place(agent: Agent, branch: Branch) -> None:
    Probe.does = lambda images: ToolResult(True, f"{len(images)} images", [Image.new("RGB", (30, 30))])
    bad = CALL.replace("}}", "}")
    turn(agent, branch, f"So.\n</think>\n\n{CALL}\n{bad}\n{CALL}\n<tool_call>{{")
    said = observed(agent, branch)
    responses = said.split("<tool_response>")[1:]
    assert [
        text in response
        for text, response in zip(("1 images", "not valid JSON", "2 images", "is not closed"), responses, strict=True)
    ] == [True] * 4
    assert [call.ok for call in branch.calls] == [True, False, True, False]
    assert [call.seconds is None for call in branch.calls] == [False, True, False, True]


def test_the_response_limit_in_the_middle_of_a_call_ends_the_trajectory(agent: Agent, branch: Branch) -> None:
    Probe.does = lambda images: pytest.fail("it was called")
    pending = turn(agent, branch, f"So.\n</think>\n\n{CALL}\n{CALL[:30]}", ends=False)
    assert (pending, branch.status, branch.reward) == ({}, "length", 0.0)
    assert [call.ok for call in branch.calls] == [False, False]
    assert branch.calls[0].error == "not run: the trajectory ended (length)"
    assert "is not closed" in (branch.calls[1].error or "")
    assert branch.calls[1].end == len(branch.sequence), "it reaches to where the turn was cut"


def test_a_tool_that_hangs_is_given_up_and_the_others_go_on(agent: Agent) -> None:
    release, hung = threading.Event(), threading.Event()

    def hangs(images: list[Image.Image]) -> ToolResult:
        hung.set()
        release.wait()  # no signal, no exception ends it
        return ToolResult(True, "too late", [Image.new("RGB", (30, 30))])

    Slow.does = hangs
    limits = replace(LIMITS, tool_timeout_s=0.5)
    call = CALL.replace("probe", "slow")
    stuck = [fresh(agent) for _ in range(4)]  # twice as many as there are workers
    pending = {}
    for one in stuck:
        pending |= turn(agent, one, f"So.\n</think>\n\n{call}\n{call}", limits)
    begun = time.monotonic()
    settle(agent, pending, limits)
    assert hung.is_set() and time.monotonic() - begun < 20
    for one in stuck:
        said = observed(agent, one)
        assert "the tool slow did not answer: a turn's calls may take 0.5 s" in said
        assert "not run: the tool slow before it did not answer" in said
        assert [(c.ok, c.timed_out) for c in one.calls] == [(False, True), (False, False)]
    # What comes back too late changes nothing, and the workers are as many as before.
    release.set()
    time.sleep(0.3)
    assert all(len(one.images) == 1 and len(one.calls) == 2 for one in stuck)
    Slow.does = lambda images: ToolResult(True, "quick")
    agent.llm.abort(stuck[0].sequence)
    pending = turn(agent, stuck[0], f"So.\n</think>\n\n{call}", limits)
    settle(agent, pending, limits)
    assert "quick" in observed(agent, stuck[0])
    for one in stuck:
        agent.llm.abort(one.sequence)
        one.sequence.close()
    deadline = time.monotonic() + 30
    while sum(thread.name == "tool" for thread in threading.enumerate()) > 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sum(thread.name == "tool" for thread in threading.enumerate()) <= 2

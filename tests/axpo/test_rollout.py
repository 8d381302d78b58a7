"""The agent loop on the embedded model: turns, tools, limits, forks, and what the model is told of its mistakes."""

import json
from dataclasses import replace

import pytest
import torch

from axpo.branch import Branch, Limits
from axpo.calls import TurnCalls
from axpo.conversation import Conversation
from axpo.grading import Rubric
from axpo.paths import model_directory
from axpo.resample import find_candidates
from axpo.rollout import Agent
from axpo.tasks import get_task
from axpo.tools import ToolResult, get_tools
from axpo.tools.parse import ParsedCall
from axpo.trajectory import OBSERVATION, PROMPT, SAMPLED
from engine import LLM, CompletionOutput

LIMITS = Limits(max_turns=3, max_new_tokens=96, max_tokens=512)


@pytest.fixture(scope="module")
def agent() -> Agent:
    llm = LLM(model_directory("mini"), dtype=torch.float32, kv_cache_bytes=1 << 26)
    return Agent(llm, Conversation(llm.processor, get_tools(["image_zoom_in"])), seed=0)


@pytest.fixture(scope="module")
def questions() -> list:
    task = get_task("mini")
    return [(index, task.question("train", index)) for index in range(6)]


def says(agent: Agent, branch: Branch, text: str) -> CompletionOutput:
    """Makes the branch have sampled `text`, then <|im_end|>."""
    tokens = [*agent.conversation.processor.encode(text), agent.conversation.end_of_turn]
    branch.sequence.extend(tokens)
    zeros = [0.0] * len(tokens)
    return CompletionOutput(0, text, tokens, [-0.1] * len(tokens), zeros, "stop", agent.conversation.end_of_turn)


def fresh(agent: Agent, question) -> Branch:
    sequence = agent._open(question, agent.llm.image_inputs(question.images), LIMITS)
    n = len(sequence)
    return Branch(
        "b", 0, question, sequence, 0, list(question.images), n, [PROMPT] * n, [None] * n, [None] * n, turn_start=n
    )


def made(agent: Agent, branch: Branch, calls: list[ParsedCall]) -> list[ToolResult]:
    return TurnCalls(branch, calls, agent.conversation.tools, lambda text: text)()


CALL = "I look.\n</think>\n\n<tool_call>\n{}\n</tool_call>"


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ('{"name": "image_zoom_in", "arguments": {"bbox_2d": [0, 0, 500', "not valid JSON"),
        ("[1, 2]", "must be an object"),
        ('{"name": "zoom", "arguments": {}}', "no tool 'zoom'"),
        ('{"name": "image_zoom_in"}', "arguments"),
        ('{"name": "image_zoom_in", "arguments": {"label": "x"}}', "bbox_2d"),
        ('{"name": "image_zoom_in", "arguments": {"bbox_2d": [1100, 0, 1200, 90], "label": "x"}}', "outside the image"),
        ('{"name": "image_zoom_in", "arguments": {"bbox_2d": [500, 0, 500, 90], "label": "x"}}', "no area"),
        (
            '{"name": "image_zoom_in", "arguments": {"bbox_2d": [0, 0, 9, 9], "label": "x", "img_idx": 7}}',
            "img_idx is 7",
        ),
    ],
)
def test_a_bad_call_is_answered_counted_and_survived(agent: Agent, questions: list, call: str, told: str) -> None:
    branch = fresh(agent, questions[0][1])
    calls = agent._end_turn(branch, says(agent, branch, CALL.format(call)), LIMITS)
    assert len(calls) == 1 and branch.status is None
    results = made(agent, branch, calls)
    assert not results[0].ok and told in results[0].text
    before = len(branch.sequence)
    agent._take([(branch, results)], LIMITS)
    assert not branch.calls[0].ok and told in (branch.calls[0].error or "")
    observation = agent.conversation.processor.decode(branch.sequence.token_ids[before:])
    assert told in observation and observation.startswith("\n<|im_start|>user\n<tool_response>\n")
    assert branch.roles[before:] == [OBSERVATION] * (len(branch.sequence) - before)
    branch.sequence.close()


def test_a_call_in_the_thinking_is_none(agent: Agent, questions: list) -> None:
    branch = fresh(agent, questions[0][1])
    text = "Perhaps <tool_call>\n{}\n</tool_call>\n</think>\n\n<answer>\\boxed{" + questions[0][1].answer + "}</answer>"
    pending: dict = {}
    agent._take([(branch, agent._turn(branch, says(agent, branch, text), LIMITS, pending))], LIMITS)
    assert (branch.status, branch.reward, branch.calls, pending) == ("answered", 1.0, [], {})
    branch.sequence.close()


def test_a_slow_grade_is_made_on_a_worker_thread(agent: Agent, questions: list) -> None:
    question = replace(questions[0][1], answer="1/2", rubric=Rubric(("1/2",), "math"))
    branch = fresh(agent, question)
    pending: dict = {}
    text = "So.\n</think>\n\n<answer>\\boxed{0.5}</answer>"
    agent._turn(branch, says(agent, branch, text), LIMITS, pending)
    assert branch.status == "answered" and branch.grading
    ((future, (waiting, _)),) = pending.items()
    agent._take([(branch, future.result(timeout=60))], LIMITS)
    assert waiting is branch and (branch.reward, branch.grading) == (1.0, False)
    branch.sequence.close()


def test_the_crop_comes_back_and_can_be_zoomed_again(agent: Agent, questions: list) -> None:
    branch = fresh(agent, questions[0][1])
    box = {"name": "image_zoom_in", "arguments": {"bbox_2d": [0, 0, 500, 500], "label": "corner"}}
    calls = agent._end_turn(branch, says(agent, branch, CALL.format(json.dumps(box))), LIMITS)
    results = made(agent, branch, calls)
    assert results[0].ok and results[0].images[0].size == (64, 64)
    agent._take([(branch, results)], LIMITS)
    assert len(branch.sequence.images) == 2 and len(branch.images) == 2
    agent.llm.abort(branch.sequence)
    branch.sequence.close()


def test_the_last_turns_call_is_not_run(agent: Agent, questions: list) -> None:
    branch = fresh(agent, questions[0][1])
    branch.turn = LIMITS.max_turns - 1
    box = {"name": "image_zoom_in", "arguments": {"bbox_2d": [0, 0, 500, 500], "label": "corner"}}
    assert agent._end_turn(branch, says(agent, branch, CALL.format(json.dumps(box))), LIMITS) == []
    assert branch.status == "turn_limit" and branch.reward == 0 and not branch.calls[0].ok
    branch.sequence.close()


def test_rollouts_are_whole_and_repeatable(agent: Agent, questions: list) -> None:
    first = agent.rollouts(1, questions, 4, LIMITS)
    made = [[agent.trajectory(branch, 1) for branch in group] for group in first]
    for group in made:
        for t in group:
            assert t.status in ("answered", "turn_limit", "length")
            assert t.roles[: t.prompt_len] == [PROMPT] * t.prompt_len
            sampled = [i for i, role in enumerate(t.roles) if role == SAMPLED]
            assert len(sampled) <= LIMITS.max_new_tokens and len(t.tokens) <= LIMITS.max_tokens
            assert all((t.logprobs[i] is not None) == (t.roles[i] == SAMPLED) for i in range(len(t.tokens)))
            assert t.positions is not None and t.positions.shape == (3, len(t.tokens))
    for group in first:
        agent.close(group)
    again = agent.rollouts(1, questions, 4, LIMITS)
    assert [[b.sequence.token_ids for b in g] for g in again] == [[t.tokens for t in g] for g in made]
    for group in again:
        agent.close(group)
    assert agent.llm.stats()["blocks_used"] == 0


def test_resampling_prefills_nothing(agent: Agent, questions: list) -> None:
    groups = agent.rollouts(1, questions, 8, LIMITS)
    trajectories = [[agent.trajectory(branch, 1) for branch in group] for group in groups]
    for group in trajectories:
        for t in group:
            t.reward = 0.0  # so that every attempt is a candidate
    candidates = find_candidates(trajectories)[:3]
    assert candidates, "no tool call in 48 rollouts of the SFT checkpoint"
    sources = {branch.id: branch for group in groups for branch in group}
    encoded = agent.llm.stats()["images_encoded"]
    before = agent.llm.stats()["prefill_tokens"]
    resamples = {c.source: agent.fork(1, sources[c.source], c.fork_token, 4) for c in candidates}
    agent.advance([branch for some in resamples.values() for branch in some], LIMITS)
    branches = [branch for some in resamples.values() for branch in some]
    observed = sum(b.roles[b.fork_token or 0 :].count(OBSERVATION) for b in branches)
    # All that is not decoded are the observations of the resamples' own calls, and the <|im_end|> before each.
    calls = sum(max(b.turn - 1, 0) for b in branches)
    assert agent.llm.stats()["prefill_tokens"] - before <= observed + calls
    assert agent.llm.stats()["images_encoded"] - encoded <= calls
    for candidate in candidates:
        source = sources[candidate.source]
        for branch in resamples[candidate.source]:
            assert (
                branch.sequence.token_ids[: candidate.fork_token] == source.sequence.token_ids[: candidate.fork_token]
            )
            assert branch.calls and branch.calls[0].start == candidate.fork_token - 1
    agent.close([*sources.values(), *branches])
    assert agent.llm.stats()["blocks_used"] == 0

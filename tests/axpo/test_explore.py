"""A step's rollouts and resamples with nobody waiting: the same selection as the plain rule, earlier."""

import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from axpo.branch import Limits
from axpo.config import Algo
from axpo.conversation import Conversation
from axpo.explore import Exploration, StepAhead, explore
from axpo.paths import model_directory
from axpo.resample import find_candidates, prefix_budget, select_prefixes
from axpo.rollout import Agent
from axpo.tasks import get_task
from axpo.tools import Tool, ToolResult, get_tools
from axpo.tools.image_zoom_in import ImageZoomIn
from engine import LLM

LIMITS = Limits(max_turns=3, max_new_tokens=96, max_tokens=512)
ALGO = Algo(group_size=4, resamples_per_prefix=2)
QUESTIONS = 24


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(model_directory("mini"), dtype=torch.float32, kv_cache_bytes=1 << 26)


@pytest.fixture(scope="module")
def questions() -> list:
    task = get_task("mini")
    return [(index, task.question("train", index)) for index in range(QUESTIONS)]


def run(llm: LLM, questions: list, algo: Algo = ALGO, tools: dict[str, Tool] | None = None) -> Exploration:
    conversation = Conversation(llm.processor, tools or get_tools(["image_zoom_in"]))
    return explore(Agent(llm, conversation, seed=0), 1, questions, len(questions), LIMITS, algo, seed=0)


@pytest.fixture(scope="module")
def explored(llm: LLM, questions: list) -> Exploration:
    return run(llm, questions)


def test_the_selection_is_the_rules(explored: Exploration, questions: list) -> None:
    assert [group[0].question_id for group in explored.groups] == [question.id for _, question in questions]
    assert all(
        [t.id for t in group] == [f"1/{group[0].question_id}/{i}" for i in range(4)] for group in explored.groups
    )
    budget = prefix_budget(ALGO.budget_ratio, QUESTIONS, ALGO.group_size, ALGO.resamples_per_prefix)
    selected = select_prefixes(find_candidates(explored.groups), budget, seed=0, step=1)
    assert len(selected) >= 3, "too few triggered groups for this test to say anything"
    assert list(explored.resamples) == [c.source for c in sorted(selected, key=lambda c: (c.group, c.rollout))]
    assert explored.budget == budget * ALGO.resamples_per_prefix
    for c in selected:
        made = explored.resamples[c.source]
        assert [t.id for t in made] == [f"{c.source}/r{i}" for i in range(2)]
        assert all(t.parent == c.source and t.fork_token == c.fork_token for t in made)


def test_resamples_start_while_stragglers_run(explored: Exploration) -> None:
    assert explored.early > 0


def test_nothing_is_held_afterwards(explored: Exploration, llm: LLM) -> None:
    assert llm.stats()["blocks_used"] == 0 and not llm.sequences


def test_without_a_budget_there_are_only_rollouts(llm: LLM, questions: list, explored: Exploration) -> None:
    plain = run(llm, questions, Algo(name="grpo", group_size=4))
    assert (plain.resamples, plain.budget, plain.early) == ({}, 0, 0)
    assert [[t.reward for t in group] for group in plain.groups] == [[t.reward for t in g] for g in explored.groups]


class Slow(ImageZoomIn):
    """The real tool on a worker thread, some of its calls late."""

    inline = False

    def call(self, arguments: Mapping[str, Any], images: list) -> ToolResult:
        time.sleep(0.02 * (len(str(arguments)) % 3))
        return super().call(arguments, images)


def test_slow_tools_change_nothing_but_the_time(llm: LLM, questions: list, explored: Exploration) -> None:
    slow = run(llm, questions, tools={"image_zoom_in": Slow()})
    assert [[t.tokens for t in group] for group in slow.groups] == [[t.tokens for t in g] for g in explored.groups]
    assert {k: [t.tokens for t in v] for k, v in slow.resamples.items()} == {
        k: [t.tokens for t in v] for k, v in explored.resamples.items()
    }
    assert llm.stats()["blocks_used"] == 0


def test_a_step_ahead_is_the_same_step(llm: LLM, questions: list, explored: Exploration) -> None:
    with StepAhead(lambda step: run(llm, questions)) as ahead:
        ahead.begin(1)
        assert ahead.running
        made = ahead.result(1)
        assert not ahead.running
    assert [[t.tokens for t in group] for group in made.groups] == [[t.tokens for t in g] for g in explored.groups]


def test_an_error_of_the_thread_is_the_loops(llm: LLM) -> None:
    def fail(step: int) -> Exploration:
        raise ValueError(f"step {step} went wrong")

    with StepAhead(fail) as ahead:
        ahead.begin(2)
        with pytest.raises(ValueError, match="step 2 went wrong"):
            ahead.result(2)

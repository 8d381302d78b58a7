"""The ablations on real steps of the embedded model: the same rollouts, other continuations."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from axpo.branch import Limits
from axpo.explore import Exploration, explore
from axpo.resample import Rule, find_candidates, prefix_budget, select_prefixes
from axpo.rollout import Agent
from axpo.tasks import get_task
from axpo.trajectory import OBSERVATION, SAMPLED, Trajectory
from axpo.tree import build_trees
from tests.axpo.factory import RESAMPLING, algo_of, credit

LIMITS = Limits(max_turns=3, max_new_tokens=96, max_tokens=512)
QUESTIONS, SIZE, K = 16, 4, 3
Explore = Callable[[str], Exploration]


@pytest.fixture(scope="module")
def step(agent: Agent) -> Explore:
    """A step of the recipe over mini; all have the same questions, seed and budget."""
    task = get_task("mini")
    questions = [(index, task.question("train", index)) for index in range(QUESTIONS)]

    @cache
    def made(recipe: str) -> Exploration:
        explored = explore(agent, 1, questions, QUESTIONS, LIMITS, algo_of(recipe, SIZE, K), seed=0)
        assert agent.llm.stats()["blocks_used"] == 0 and not agent.llm.sequences
        return explored

    return made


def continuations(explored: Exploration) -> list[Trajectory]:
    return [c for some in explored.resamples.values() for c in some]


def sources(explored: Exploration) -> dict[str, Trajectory]:
    return {t.id: t for group in explored.groups for t in group}


@pytest.mark.parametrize("recipe", RESAMPLING)
def test_the_rollouts_are_the_same_and_the_selection_is_the_rules(agent: Agent, step: Explore, recipe: str):
    algo, explored = algo_of(recipe, SIZE, K), step(recipe)
    assert [[t.tokens for t in g] for g in explored.groups] == [[t.tokens for t in g] for g in step("mini").groups]
    rule = Rule(algo.trigger, algo.fork_at, agent.conversation.markup.think_end, algo.entropy_window)
    candidates = find_candidates(explored.groups, rule)
    assert explored.candidates == candidates
    budget = prefix_budget(algo.budget_ratio, QUESTIONS, SIZE, K)
    selected = select_prefixes(candidates, budget, rank=algo.rank, seed=0, step=1)
    assert len(selected) >= 3, "too little is resampled for this test to say anything"
    assert set(explored.resamples) == {c.source for c in selected}
    assert explored.budget == budget * K == step("mini").budget, "the same extra budget"
    for c in selected:
        source = sources(explored)[c.source]
        for made in explored.resamples[c.source]:
            assert (made.parent, made.fork_token, made.prompt_len) == (c.source, c.fork_token, source.prompt_len)
            for name in ("tokens", "roles", "logprobs", "entropies"):
                assert getattr(made, name)[: c.fork_token] == getattr(source, name)[: c.fork_token]
            assert made.roles[c.fork_token] == SAMPLED and len(made.tokens) > c.fork_token


@pytest.mark.parametrize("recipe", RESAMPLING)
def test_a_step_is_credited_and_packed(agent: Agent, step: Explore, recipe: str):
    """Real trajectories make whole trees: every trained token is in them once, with its own log-prob."""
    explored = step(recipe)
    credit(explored.groups, explored.resamples, algo_of(recipe, SIZE, K))
    image = agent.llm.model.config.image_token_id
    trees = [tree for group in explored.groups for tree in build_trees(group, explored.resamples, image)]
    everything = [*sources(explored).values(), *continuations(explored)]
    expected = sorted(
        lp for t in everything for lp, on in zip(t.logprobs, t.loss_mask, strict=True) if on and lp is not None
    )
    packed = np.sort(np.concatenate([tree.old_logprobs.numpy() for tree in trees]))
    assert np.array_equal(packed, np.array(expected, np.float32))


def test_without_the_fix_new_rollouts_are_free_to_leave_the_tool(step: Explore):
    explored = step("no-prefix-fix")
    assert set(explored.resamples) == set(step("mini").resamples), "the same questions in the same order"
    made = continuations(explored)
    assert all(t.fork_token == t.prompt_len for t in made)
    assert {t.used_tool for t in made} == {True, False}
    assert all(t.used_tool for t in continuations(step("mini")))
    assert len({tuple(t.tokens) for t in made}) > len(made) / 2, "they are not the source again"


def test_the_no_tool_target_keeps_the_thinking(agent: Agent, step: Explore):
    explored = step("no-tool-target")
    for source, made in explored.resamples.items():
        rollout = sources(explored)[source]
        assert not rollout.used_tool and not rollout.correct
        assert not any(t.correct for t in explored.groups[rollout.group] if not t.used_tool)
        for t in made:
            assert t.tokens[(t.fork_token or 0) - 1] == agent.conversation.markup.think_end
            assert agent.conversation.markup.think_end not in t.tokens[t.prompt_len : (t.fork_token or 0) - 1]


def test_arpo_goes_on_from_what_the_tool_showed(step: Explore):
    explored = step("arpo")
    for source, made in explored.resamples.items():
        rollout = sources(explored)[source]
        for t in made:
            fork = t.fork_token or 0
            assert rollout.roles[fork - 1] == OBSERVATION and rollout.roles[fork] == SAMPLED
            before = [call for call in rollout.tool_calls if call.end <= fork]
            assert before and t.tool_calls[: len(before)] == before, "the calls before the fork are its own, too"
            assert len(t.images) >= 1 + sum(call.ok for call in before), "and so are the crops"
            assert all(call.turn >= before[-1].turn + 1 for call in t.tool_calls[len(before) :])
    rises = {c.source: c.rise for c in explored.candidates}
    worst_taken = min(rises[source] for source in explored.resamples)
    first_of = {c.group: max(d.rise for d in explored.candidates if d.group == c.group) for c in explored.candidates}
    left = [c for c in explored.candidates if c.source not in explored.resamples]
    assert all(rise > 0 for rise in rises.values())
    assert all(c.rise <= worst_taken or c.rise < first_of[c.group] for c in left), "the steepest of a question first"


def test_a_random_rank_takes_as_many_others(step: Explore):
    algo = algo_of("random-rank", SIZE, K)
    candidates = step("mini").candidates
    drawn = [
        {c.source for c in select_prefixes(candidates, 3, rank=algo.rank, seed=seed, step=1)} for seed in range(20)
    ]
    assert all(len(some) == 3 for some in drawn) and len({frozenset(some) for some in drawn}) > 1


@pytest.mark.parametrize("recipe", ["no-prefix-credit", "merged-group"])
def test_an_ablation_of_credit_samples_what_axpo_samples(step: Explore, recipe: str):
    assert [(t.id, t.tokens, t.reward) for t in continuations(step(recipe))] == [
        (t.id, t.tokens, t.reward) for t in continuations(step("mini"))
    ]

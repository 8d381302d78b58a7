"""Fork points and triggers, against the rules written down plainly."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo.forks import Fork, find_fork
from axpo.resample import Candidate, Rule, find_candidates, select_prefixes
from axpo.trajectory import OBSERVATION, SAMPLED, Trajectory
from tests.axpo.factory import CLOSE, END, OPEN, THINK_END, random_group

KINDS = ("call", "prompt", "answer", "observation")


def judged(rollout: Trajectory, inside: list[int]) -> tuple[float, float]:
    """(mean probability, mean entropy) of these tokens."""
    probabilities = [math.exp(rollout.logprobs[i] or 0.0) for i in inside]
    return float(np.mean(probabilities)), float(np.mean([rollout.entropies[i] or 0.0 for i in inside]))


def plain_fork(rollout: Trajectory, kind: str, window: int) -> tuple[int, list[int]] | None:
    """(tokens kept, tokens judged) for the factory's rollouts, by their tokens alone; not for observations."""
    tokens, start = rollout.tokens, rollout.prompt_len
    call = None
    if OPEN in tokens:
        first = tokens.index(OPEN)
        call = first + 1, list(range(first + 1, tokens.index(CLOSE) + 1))
    end = tokens.index(END, start) + 1
    think = tokens.index(THINK_END, start) + 1
    answer = think, list(range(think, end))
    if kind == "call":
        return call
    if kind == "answer":
        return answer
    return start, (call or answer)[1]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(KINDS[:3]))
def test_forks_against_the_plain_rule(seed: int, kind):
    for rollout in random_group(random.Random(seed), size=3):
        expected = plain_fork(rollout, kind, 20)
        found = find_fork(rollout, kind, THINK_END, 20)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert found.tokens == expected[0] and found.rise == 0
            assert (found.confidence, found.entropy) == pytest.approx(judged(rollout, expected[1]))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_a_fork_behind_an_observation_is_where_entropy_rose_most(seed: int, window: int):
    for rollout in random_group(random.Random(seed), size=3, tool_rate=0.8):
        roles = rollout.roles
        turns: list[list[int]] = [[]]
        for i in range(rollout.prompt_len, len(roles)):
            if roles[i] == SAMPLED:
                turns[-1].append(i)
            elif turns[-1]:
                turns.append([])
        means = [judged(rollout, turn[:window])[1] for turn in turns if turn]
        rises = [mean - means[0] for mean in means[1:]]
        found = find_fork(rollout, "observation", THINK_END, window)
        if not rises or max(rises) <= 0:
            assert found is None
        else:
            best = turns[1 + rises.index(max(rises))]
            assert found is not None and found.tokens == best[0] and roles[best[0] - 1] == OBSERVATION
            assert found.rise == pytest.approx(max(rises))
            assert (found.confidence, found.entropy) == pytest.approx(judged(rollout, best[:window]))


def test_where_there_is_nothing_to_fork():
    rollout = random_group(random.Random(1), size=1, tool_rate=0.0)[0]
    assert find_fork(rollout, "call", THINK_END, 20) is None
    assert find_fork(rollout, "observation", THINK_END, 20) is None
    at = rollout.tokens.index(THINK_END)
    unfinished = replace(rollout, tokens=[*rollout.tokens[:at], 9, *rollout.tokens[at + 1 :]])
    assert find_fork(unfinished, "answer", THINK_END, 20) is None, "its thinking never ends"
    assert find_fork(unfinished, "prompt", THINK_END, 20) is None
    cut = {
        name: getattr(rollout, name)[: at + 1]
        for name in ("tokens", "roles", "loss_mask", "logprobs", "entropies", "advantages")
    }
    assert find_fork(replace(rollout, **cut), "answer", THINK_END, 20) is None, "nothing was sampled behind it"
    rollout.entropies[at + 1] = None
    with pytest.raises(ValueError, match="not sampled"):
        find_fork(rollout, "answer", THINK_END, 20)


@pytest.mark.parametrize("ended_by", [END, OPEN])
def test_a_call_without_a_token_of_its_own_is_a_candidate(ended_by: int):
    """Judged by the token that ended it; only behind a tag at the limit of tokens can nothing be continued."""
    rollout = next(r for r in random_group(random.Random(3), tool_rate=1.0) if r.tool_calls)
    call = rollout.tool_calls[0]
    names = ("tokens", "roles", "loss_mask", "logprobs", "entropies", "advantages")
    cut = {name: getattr(rollout, name)[: call.start + 2] for name in names}
    empty = replace(call, name=None, arguments=None, ok=False, error="not closed", end=call.start + 1)
    bare = replace(rollout, **cut, tool_calls=[empty], reward=0.0)
    bare.tokens[-1] = ended_by
    fork = find_fork(bare, "call", THINK_END, 20)
    assert fork is not None and fork.tokens == call.start + 1
    assert (fork.confidence, fork.entropy) == pytest.approx(judged(bare, [call.start + 1]))
    assert [c.source for c in find_candidates([[bare]])] == [bare.id]
    at_limit = replace(bare, **{name: values[:-1] for name, values in cut.items()})
    assert find_fork(at_limit, "call", THINK_END, 20) is None


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["tool", "no_tool", "always"]), st.sampled_from(KINDS))
def test_a_trigger_takes_its_subgroup_and_nothing_else(seed: int, trigger, kind):
    rng = random.Random(seed)
    groups = [random_group(rng, g, success_rate=rng.choice([0.0, 0.2])) for g in range(4)]
    found = find_candidates(groups, Rule(trigger, kind, THINK_END, 4))
    expected = []
    for group in groups:
        subgroup = [r for r in group if trigger == "always" or bool(r.tool_calls) == (trigger == "tool")]
        if trigger == "always" or not any(r.reward for r in subgroup):
            for index, rollout in enumerate(group):
                fork = find_fork(rollout, kind, THINK_END, 4) if rollout in subgroup else None
                if fork is not None:
                    expected.append((group[0].group, index, rollout.id, fork))
    assert [
        (c.group, c.rollout, c.source, Fork(c.fork_token, c.confidence, c.entropy, c.rise)) for c in found
    ] == expected


def test_the_default_rule_is_the_papers():
    rng = random.Random(5)
    groups = [random_group(rng, g, success_rate=0.2) for g in range(6)]
    plain = [
        (r.id, r.tool_calls[0].start + 1)
        for group in groups
        if not any(r.reward for r in group if r.tool_calls)
        for r in group
        if r.tool_calls
    ]
    assert plain and [(c.source, c.fork_token) for c in find_candidates(groups)] == plain


def test_the_steepest_rise_comes_first():
    made = [Candidate(g, 0, str(g), 5, 0.5, 0.5, rise) for g, rise in enumerate([0.1, 0.4, 0.2])]
    assert [c.group for c in select_prefixes(made, 3, rank="entropy_rise")] == [1, 2, 0]

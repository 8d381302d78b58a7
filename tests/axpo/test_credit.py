"""Credit assignment: one source a token, the values of PAPER.md on the right tokens, GRPO when nothing is resampled."""

import random
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo.advantage import assign_credit, group_advantages, prefix_advantages, shaped_reward
from axpo.trajectory import SAMPLED, Trajectory
from tests.axpo.factory import random_group, random_resamples

Resamples = dict[str, list[Trajectory]]


def random_step(seed: int) -> tuple[list[list[Trajectory]], Resamples]:
    rng = random.Random(seed)
    groups = [random_group(rng, group, size=4) for group in range(3)]
    sources = [r for group in groups for r in group if r.used_tool and rng.random() < 0.6]
    return groups, {source.id: random_resamples(rng, source) for source in sources}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_every_generated_token_is_trained_from_exactly_one_place(seed: int, mask_failed_suffix: bool):
    groups, resamples = random_step(seed)
    assign_credit(groups, resamples, mask_failed_suffix=mask_failed_suffix)
    trained: dict[tuple[str, int], int] = {}
    for trajectory in [t for group in [*groups, *resamples.values()] for t in group]:
        for i, role in enumerate(trajectory.roles):
            owner = trajectory.id if i >= (trajectory.fork_token or 0) else trajectory.parent
            assert trajectory.loss_mask[i] <= (role == SAMPLED)
            assert trajectory.loss_mask[i] or trajectory.advantages[i] == 0
            if role == SAMPLED:
                trained[owner or "", i] = trained.get((owner or "", i), 0) + trajectory.loss_mask[i]
    for (owner, i), count in trained.items():
        continuations = resamples.get(owner, [])
        masked = False
        if continuations and i >= (continuations[0].fork_token or 0):
            masked = mask_failed_suffix or any(c.correct for c in continuations)
        assert count == (0 if masked else 1), (owner, i)


def test_values_of_each_role():
    seed = random.getrandbits(32)
    groups, resamples = random_step(seed)
    assign_credit(groups, resamples)
    for group in groups:
        rewards = [rollout.reward for rollout in group]
        plain = group_advantages(rewards)
        for index, rollout in enumerate(group):
            continuations = resamples.get(rollout.id)
            expected = plain[index]
            if continuations:
                expected = prefix_advantages(rewards, {index: any(c.correct for c in continuations)})[index]
                own = group_advantages([c.reward for c in continuations])
                for continuation, advantage in zip(continuations, own, strict=True):
                    assert trained_values(continuation) <= {float(advantage)}, f"seed {seed}"
            assert trained_values(rollout) <= {float(expected)}, f"seed {seed}"


def trained_values(trajectory: Trajectory) -> set[float]:
    return {a for a, trained in zip(trajectory.advantages, trajectory.loss_mask, strict=True) if trained}


def test_two_sources_of_one_group_start_from_the_original_rewards():
    rng = random.Random(5)
    group = [replace(rollout, reward=0.0) for rollout in random_group(rng, size=4, tool_rate=1.0)]
    group[3].reward = 1.0
    resamples = {}
    for source in group[:2]:
        resamples[source.id] = [replace(c, reward=1.0) for c in random_resamples(rng, source)]
    assign_credit([group], resamples)
    assert trained_values(group[0]) == {float(group_advantages([1.0, 0.0, 0.0, 1.0])[0])}
    assert trained_values(group[1]) == {float(group_advantages([0.0, 1.0, 0.0, 1.0])[1])}
    assert trained_values(group[2]) == {float(group_advantages([0.0, 0.0, 0.0, 1.0])[2])}


def test_no_resamples_is_grpo_bit_for_bit():
    groups, _ = random_step(11)
    assign_credit(groups, {})
    for group in groups:
        rewards = np.array([rollout.reward for rollout in group])
        std = rewards.std(ddof=1)
        for rollout in group:
            assert rollout.loss_mask == [int(role == SAMPLED) for role in rollout.roles]
            value = float((rollout.reward - rewards.mean()) / (std + 1e-6)) if std else 0.0
            assert rollout.advantages == [value if role == SAMPLED else 0.0 for role in rollout.roles]


def test_a_resample_must_fit_its_source():
    rng = random.Random(3)
    group = random_group(rng, tool_rate=1.0)
    resamples = random_resamples(rng, group[0])
    with pytest.raises(ValueError, match="unknown rollouts"):
        assign_credit([group], {"nobody": resamples})
    with pytest.raises(ValueError, match="does not begin with"):
        assign_credit([group], {group[1].id: resamples})
    with pytest.raises(ValueError, match="one token behind its prompt"):
        assign_credit([group], {group[0].id: [*resamples, replace(resamples[0], fork_token=group[0].prompt_len)]})


def test_what_has_nothing_to_learn_is_dropped_and_the_rest_stays():
    seed = random.getrandbits(32)
    groups, resamples = random_step(seed)
    for rollout in groups[0]:
        rollout.reward = 0.0
    source = random_group(random.Random(seed), 9, tool_rate=1.0)
    failed, recovered = (random_resamples(random.Random(seed), rollout) for rollout in source[:2])
    for trajectory in [*source, *failed, *recovered]:
        trajectory.reward = 0.0
    recovered[2].reward = 1.0
    groups.append(source)
    resamples = {id: some for id, some in resamples.items() if not id.startswith("0.")}
    resamples |= {source[0].id: failed, source[1].id: recovered}
    kept = deepcopy((groups, resamples))
    assign_credit(*kept)
    assign_credit(groups, resamples, drop_equal=True)
    together = [*zip(groups, kept[0], strict=True), *((resamples[id], kept[1][id]) for id in resamples)]
    dropped = 0
    for after, before in together:
        useful = any(any(trajectory.advantages) for trajectory in before)
        dropped += not useful
        assert [t.advantages for t in after] == [t.advantages for t in before]
        assert [t.loss_mask for t in after] == [t.loss_mask if useful else [0] * len(t.tokens) for t in before], seed
    assert not any(any(r.loss_mask) for r in groups[0]), "all rollouts are wrong"
    assert not any(any(c.loss_mask) for c in failed), "no continuation is right"
    assert any(source[1].loss_mask) and any(source[2].loss_mask), "a recovered prefix keeps its group"
    assert all(any(c.loss_mask) for c in recovered) and dropped >= 2


def test_shaped_rewards_change_advantages_and_not_what_is_right():
    groups, resamples = random_step(13)
    shape = {t.id: 0.01 * i + t.reward for i, t in enumerate(t for g in [*groups, *resamples.values()] for t in g)}
    assign_credit(groups, resamples, shape=lambda t: shape[t.id], std=1.0)
    for group in groups:
        rewards = [shape[rollout.id] for rollout in group]
        recovered = {i: any(c.reward > 0 for c in resamples[r.id]) for i, r in enumerate(group) if r.id in resamples}
        prefixes = prefix_advantages(rewards, recovered, std=1.0)
        for index, rollout in enumerate(group):
            expected = prefixes.get(index, rewards[index] - np.mean(rewards))
            assert [*trained_values(rollout)] == pytest.approx([expected])
    for continuations in resamples.values():
        rewards = [shape[c.id] for c in continuations]
        for continuation, reward in zip(continuations, rewards, strict=True):
            assert [*trained_values(continuation)] == pytest.approx([reward - np.mean(rewards)])


def ablation_case() -> tuple[list[list[Trajectory]], dict[str, list[Trajectory]], Trajectory]:
    rng = random.Random(7)
    group = random_group(rng, size=4, tool_rate=1.0)
    for rollout, reward in zip(group, (0.0, 1.0, 1.0, 0.0), strict=True):
        rollout.reward = reward
    continuations = random_resamples(rng, group[0])
    for index, continuation in enumerate(continuations):
        continuation.reward = float(index == 0)
    return [group], {group[0].id: continuations}, group[0]


def values(trajectory: Trajectory) -> set[float]:
    return {a for a, trained in zip(trajectory.advantages, trajectory.loss_mask, strict=True) if trained}


def test_without_prefix_credit_only_the_prefix_changes():
    groups, resamples, source = ablation_case()
    plain_groups, plain_resamples = deepcopy(groups), deepcopy(resamples)
    assign_credit(plain_groups, plain_resamples)
    assign_credit(groups, resamples, prefix_reward="own")
    assert values(source) == {float(group_advantages([0, 1, 1, 0])[0])}, "its own failure, though a resample succeeded"
    assert values(plain_groups[0][0]) == {float(group_advantages([1, 1, 1, 0])[0])}
    assert source.loss_mask == plain_groups[0][0].loss_mask
    for one, other in zip(groups[0][1:], plain_groups[0][1:], strict=True):
        assert one.advantages == other.advantages
    for one, other in zip(resamples[source.id], plain_resamples[source.id], strict=True):
        assert (one.advantages, one.loss_mask) == (other.advantages, other.loss_mask)


def test_merged_continuations_are_normalised_with_their_group():
    groups, resamples, source = ablation_case()
    masks = deepcopy(groups), deepcopy(resamples)
    assign_credit(*masks)
    assign_credit(groups, resamples, merge=True)
    count = len(resamples[source.id])
    everything = group_advantages([0, 1, 1, 0, 1, *[0] * (count - 1)])
    for index, rollout in enumerate(groups[0][1:], 1):
        assert values(rollout) == {float(everything[index])}
    for index, continuation in enumerate(resamples[source.id]):
        assert values(continuation) == {float(everything[4 + index])}
    assert values(source) == {float(group_advantages([1, 1, 1, 0, 1, *[0] * (count - 1)])[0])}
    assert [r.loss_mask for r in groups[0]] == [r.loss_mask for r in masks[0][0]]


def test_a_tool_reward_is_added_where_a_call_was_attempted():
    rollout = random_group(random.Random(3), size=1, tool_rate=1.0)[0]
    shape = {"max_new_tokens": 100, "buffer": 0, "penalty": 1.0}
    for reward in (-0.1, 0.0, 0.25):
        assert shaped_reward(rollout, **shape, tool_reward=reward) == rollout.reward + reward
        silent = replace(rollout, tool_calls=[])
        assert shaped_reward(silent, **shape, tool_reward=reward) == rollout.reward

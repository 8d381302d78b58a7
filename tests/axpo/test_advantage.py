"""Group-normalised advantages: the tables of PAPER.md."""

import random

import numpy as np
import pytest

from axpo.advantage import advantage_std, group_advantages, prefix_advantages, shaped_reward
from tests.axpo.factory import random_group


@pytest.mark.parametrize(
    ("successes", "right", "wrong"),
    [(1, 1.5, -0.5), (2, 0.866, -0.866), (3, 0.5, -1.5), (0, 0.0, 0.0), (4, 0.0, 0.0)],
)
def test_four_continuations(successes: int, right: float, wrong: float):
    advantages = group_advantages([1.0] * successes + [0.0] * (4 - successes))
    assert advantages == pytest.approx([right] * successes + [wrong] * (4 - successes), abs=5e-4)


@pytest.mark.parametrize(
    ("others", "recovered", "failed"),
    [(0, 2.475, 0.0), (1, 1.620, -0.354), (2, 1.208, -0.540), (3, 0.935, -0.725), (7, 0.0, -2.475)],
)
def test_prefix_in_a_group_of_eight(others: int, recovered: float, failed: float):
    rewards = [1.0] * others + [0.0] * (8 - others)
    assert prefix_advantages(rewards, {7: True})[7] == pytest.approx(recovered, abs=6e-4)
    assert prefix_advantages(rewards, {7: False})[7] == pytest.approx(failed, abs=6e-4)


def test_against_the_formula_and_the_original_rewards_stay():
    seed = random.getrandbits(32)
    rng = np.random.default_rng(seed)
    rewards = [*rng.integers(0, 2, 16).astype(float).tolist(), 1.0, 0.0]
    kept = list(rewards)
    expected = [(r - np.mean(rewards)) / (np.std(rewards, ddof=1) + 1e-6) for r in rewards]
    assert group_advantages(rewards) == pytest.approx(expected, rel=1e-12), f"seed {seed}"
    prefix_advantages(rewards, {17: True})
    assert rewards == kept


def test_several_sources_of_one_group():
    """Each from the original rewards, or all from the rewards with every recovery in its place."""
    rewards = [0.0, 0.0, 0.0, 1.0]
    recovered = {0: True, 1: False, 2: True}
    each = prefix_advantages(rewards, recovered)
    one, none = group_advantages([1.0, 0.0, 0.0, 1.0]), group_advantages(rewards)
    assert each == {0: one[0], 1: none[1], 2: one[0]}
    joint = group_advantages([1.0, 0.0, 1.0, 1.0])
    assert prefix_advantages(rewards, recovered, prefix_reward="joint") == {i: joint[i] for i in recovered}


@pytest.mark.parametrize("rewards", [[], [1.0], [0.1] * 7, [1 / 3] * 3])
def test_no_spread_gives_exactly_zero(rewards: list[float]):
    assert group_advantages(rewards).tolist() == [0.0] * len(rewards)


def test_what_centred_rewards_are_divided_by():
    seed = random.getrandbits(32)
    rewards = np.random.default_rng(seed).normal(size=(3, 8))
    flat = rewards.flatten().tolist()
    assert advantage_std("group", flat) is None
    assert advantage_std("none", flat) == 1.0
    batch = advantage_std("batch", flat)
    mean = sum(flat) / 24
    assert batch == pytest.approx((sum((r - mean) ** 2 for r in flat) / 23) ** 0.5 + 1e-6, rel=1e-12), f"seed {seed}"
    for group in rewards.tolist():
        centre = sum(group) / 8
        assert group_advantages(group, std=1.0) == pytest.approx([r - centre for r in group], rel=1e-12)
        assert group_advantages(group, std=batch) == pytest.approx([(r - centre) / batch for r in group], rel=1e-12)
    assert prefix_advantages([0.0, 0.0, 1.0, 0.0], {0: True}, std=1.0) == {0: 0.5}
    assert group_advantages([0.3] * 4, std=1.0).tolist() == [0.0] * 4


def test_overlong_rewards_fall_over_the_buffer():
    """DAPO, equation 13, with L_max 100 and L_cache 20: 0 up to 80 tokens, −1 at 100, −0.25 at 85."""
    (trajectory,) = random_group(random.Random(1), size=1)
    trajectory.reward = 1.0
    for sampled, expected in [(10, 1.0), (80, 1.0), (85, 0.75), (90, 0.5), (100, 0.0), (130, 0.0)]:
        trajectory.roles = [0, 0, 2, *[1] * sampled]
        assert shaped_reward(trajectory, max_new_tokens=100, buffer=20, penalty=1.0) == pytest.approx(expected)
        assert shaped_reward(trajectory, max_new_tokens=100, buffer=20, penalty=0.5) == pytest.approx(
            (1 + expected) / 2
        )
        assert shaped_reward(trajectory, max_new_tokens=100, buffer=0, penalty=1.0) == 1.0

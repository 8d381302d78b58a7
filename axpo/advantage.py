"""Advantages and credit: which tokens are trained, and how hard (PAPER.md, "GRPO" and "AXPO" 6)."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from axpo.trajectory import SAMPLED, Trajectory

PrefixReward = Literal["original", "joint"]


def assign_credit(
    groups: Sequence[Sequence[Trajectory]],
    resamples: Mapping[str, Sequence[Trajectory]],
    *,
    eps: float = 1e-6,
    prefix_reward: PrefixReward = "original",
    mask_failed_suffix: bool = True,
) -> None:
    """Fill `loss_mask` and `advantages` of every rollout and resample, in place.

    groups: the N original rollouts of each question. resamples: source rollout id → its K continuations.
    Every generated token is trained from at most one trajectory: a continuation on its own tokens, its source on the
    prefix; the source's suffix is masked. Without resamples this is GRPO, bit for bit.
    prefix_reward: "original" normalises each recovery reward among the group's original rewards, "joint" with the
    recovery rewards of all the group's sources in their places.
    mask_failed_suffix=False trains the suffix of a source that no continuation recovered, as GRPO would.
    """
    sources = {rollout.id for group in groups for rollout in group}
    if unknown := set(resamples) - sources:
        raise ValueError(f"resamples of unknown rollouts {sorted(unknown)}")
    for group in groups:
        rewards = [rollout.reward for rollout in group]
        advantages = group_advantages(rewards, eps)
        prefixes = prefix_advantages(rewards, _recoveries(group, resamples), eps, prefix_reward)
        for index, rollout in enumerate(group):
            _train(rollout, 0, len(rollout.tokens), advantages[index])
            if continuations := resamples.get(rollout.id):
                _credit_source(rollout, continuations, prefixes[index], mask_failed_suffix)
                _credit_continuations(continuations, eps)


def group_advantages(rewards: Sequence[float], eps: float = 1e-6) -> np.ndarray:
    """A_i = (r_i − mean(r)) / (std(r) + eps) with the sample standard deviation; 0 where std is 0. float64 [N]."""
    values = np.asarray(rewards, dtype=np.float64)
    if len(values) < 2 or (values == values[0]).all():
        return np.zeros_like(values)
    return (values - values.mean()) / (values.std(ddof=1) + eps)


def prefix_advantages(
    rewards: Sequence[float],
    recovered: Mapping[int, bool],
    eps: float = 1e-6,
    prefix_reward: PrefixReward = "original",
) -> dict[int, float]:
    """Â_prefix of each source: its entry of the group, normalised after r_prefix ∈ {0, 1} replaced its own reward.

    rewards: the group's original N. recovered: index of each source → whether any of its continuations is correct.
    """
    joint = [float(recovered.get(i, reward)) for i, reward in enumerate(rewards)]
    advantages = {}
    for source, success in recovered.items():
        replaced = list(joint if prefix_reward == "joint" else rewards)
        replaced[source] = float(success)
        advantages[source] = float(group_advantages(replaced, eps)[source])
    return advantages


def _recoveries(group: Sequence[Trajectory], resamples: Mapping[str, Sequence[Trajectory]]) -> dict[int, bool]:
    return {i: any(c.correct for c in resamples[r.id]) for i, r in enumerate(group) if resamples.get(r.id)}


def _credit_source(
    source: Trajectory, continuations: Sequence[Trajectory], prefix_advantage: float, mask_failed_suffix: bool
) -> None:
    fork = _fork_token(source, continuations)
    source.advantages[:fork] = [prefix_advantage if trained else 0.0 for trained in source.loss_mask[:fork]]
    if mask_failed_suffix or any(continuation.correct for continuation in continuations):
        source.loss_mask[fork:] = [0] * (len(source.tokens) - fork)
        source.advantages[fork:] = [0.0] * (len(source.tokens) - fork)


def _credit_continuations(continuations: Sequence[Trajectory], eps: float) -> None:
    """Â_k = (r_k − mean_K) / std_K over the K continuations alone, on their own tokens."""
    advantages = group_advantages([continuation.reward for continuation in continuations], eps)
    for continuation, advantage in zip(continuations, advantages, strict=True):
        assert continuation.fork_token is not None
        _train(continuation, continuation.fork_token, len(continuation.tokens), advantage)


def _fork_token(source: Trajectory, continuations: Sequence[Trajectory]) -> int:
    """The one index at which all continuations leave their source; ValueError when they disagree with it."""
    forks = {continuation.fork_token for continuation in continuations}
    fork = forks.pop()
    if forks or fork is None or not source.prompt_len < fork <= len(source.tokens):
        raise ValueError(f"resamples of {source.id} must fork at one token behind its prompt, not {fork} and {forks}")
    for continuation in continuations:
        if continuation.parent != source.id or continuation.tokens[:fork] != source.tokens[:fork]:
            raise ValueError(f"resample {continuation.id} does not begin with the first {fork} tokens of {source.id}")
    return fork


def _train(trajectory: Trajectory, start: int, end: int, advantage: float) -> None:
    """Train exactly the sampled tokens of [start, end), all with one advantage."""
    mask = [int(start <= i < end and role == SAMPLED) for i, role in enumerate(trajectory.roles)]
    trajectory.loss_mask = mask
    trajectory.advantages = [float(advantage) if trained else 0.0 for trained in mask]

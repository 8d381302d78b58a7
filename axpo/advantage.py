"""Advantages and credit: which tokens are trained, and how hard (PAPER.md, "GRPO" and "AXPO" 6)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Literal

import numpy as np

from axpo.trajectory import SAMPLED, Trajectory

PrefixReward = Literal["original", "joint", "own", "mean"]
Scale = Literal["group", "batch", "none"]
Shape = Callable[[Trajectory], float]
"""Trajectory → the reward of which advantages are taken."""


def assign_credit(
    groups: Sequence[Sequence[Trajectory]],
    resamples: Mapping[str, Sequence[Trajectory]],
    *,
    eps: float = 1e-6,
    std: float | None = None,
    shape: Shape = attrgetter("reward"),
    prefix_reward: PrefixReward = "original",
    mask_failed_suffix: bool = True,
    mask_recovered_suffix: bool = True,
    merge: bool = False,
    drop_equal: bool = False,
) -> None:
    """Fill `loss_mask` and `advantages` of every rollout and resample, in place.

    groups: the N original rollouts of each question. resamples: source rollout id → its K continuations.
    Every generated token is trained from at most one trajectory: a continuation on its own tokens, its source on the
    prefix; the source's suffix is masked. Without resamples this is GRPO, bit for bit. Continuations from the prompt
    (an ablation) share nothing that was sampled: their source is credited as if it had none.
    prefix_reward: "original" normalises each recovery reward among the group's original rewards, "joint" with the
    recovery rewards of all the group's sources in their places; "own" gives the prefix no credit for a recovery: it
    keeps its rollout's advantage (an ablation of the paper's). "mean", which needs `merge`: the mean advantage of the
    source and its continuations, all of which go on from it (ARPO's hard attribution, arXiv 2507.19849).
    merge: continuations join their source's group in every normalisation (an ablation too).
    mask_failed_suffix=False trains the suffix of a source that no continuation recovered, as GRPO would;
    mask_recovered_suffix=False also that of one which was (ARPO: the source is one branch of K + 1).
    std: what centred rewards are divided by in place of their own group's (`advantage_std`).
    shape: reward shaping. Triggers and recoveries stay what the answers are, and a recovery reward is 0 or 1.
    drop_equal masks a question's rollouts, and a prefix's continuations, where all their advantages are 0: DAPO's
    dynamic sampling (Yu et al., 2025), after resampling.
    """
    sources = {rollout.id for group in groups for rollout in group}
    if unknown := set(resamples) - sources:
        raise ValueError(f"resamples of unknown rollouts {sorted(unknown)}")
    for group in groups:
        rewards = [shape(rollout) for rollout in group]
        if merge:
            rewards += [shape(c) for rollout in group for c in resamples.get(rollout.id, ())]
        advantages = group_advantages(rewards, eps, std)
        prefixes = prefix_advantages(rewards, _recoveries(group, resamples), eps, prefix_reward, std)
        merged = len(group)
        for index, rollout in enumerate(group):
            _train(rollout, 0, len(rollout.tokens), advantages[index])
            if continuations := resamples.get(rollout.id):
                own = group_advantages([shape(c) for c in continuations], eps, std)
                if merge:
                    own = advantages[merged : merged + len(continuations)]
                    merged += len(continuations)
                prefix = prefixes[index]
                if prefix_reward == "mean":
                    prefix = float(np.mean([advantages[index], *own]))
                recovered = any(continuation.correct for continuation in continuations)
                masked = mask_recovered_suffix if recovered else mask_failed_suffix
                _credit_source(rollout, continuations, prefix, masked)
                _credit_continuations(continuations, own)
        if drop_equal:
            for trajectories in (group, *(resamples.get(rollout.id, ()) for rollout in group)):
                _drop_if_equal(trajectories)


def group_advantages(rewards: Sequence[float], eps: float = 1e-6, std: float | None = None) -> np.ndarray:
    """A_i = (r_i − mean(r)) / (std(r) + eps) with the sample standard deviation; 0 where std is 0. float64 [N].

    std: divides in place of std(r) + eps; 1 leaves the centred rewards, which is Dr. GRPO's (Liu et al., 2025).
    """
    values = np.asarray(rewards, dtype=np.float64)
    if len(values) < 2 or (values == values[0]).all():
        return np.zeros_like(values)
    return (values - values.mean()) / (values.std(ddof=1) + eps if std is None else std)


def advantage_std(scale: Scale, rewards: Iterable[float], eps: float = 1e-6) -> float | None:
    """`std` of `assign_credit`. rewards: of all the step's rollouts and resamples, over all ranks.

    group: each group's own (None). none: 1. batch: sample standard deviation over the step, so that a group with
    little spread is not blown up (Liu et al., "Part I: Tricks or Traps?", 2025: group mean, batch deviation).
    """
    if scale == "group":
        return None
    return 1.0 if scale == "none" else float(np.std(list(rewards), ddof=1) + eps)


def shaped_reward(
    trajectory: Trajectory, *, max_new_tokens: int, buffer: int, penalty: float, tool_reward: float = 0.0
) -> float:
    """The reward, with DAPO's soft overlong punishment (Yu et al., 2025) and a bonus or penalty for using a tool.

    It is lowered over the last `buffer` tokens: not up to max_new_tokens − buffer sampled tokens, by `penalty` at
    max_new_tokens, linearly in between. Counted are all turns' tokens, a resample's prefix included. buffer 0 is off.
    tool_reward is added where a call was attempted (the paper's comparisons; negative: a penalty).
    """
    reward = trajectory.reward + (tool_reward if trajectory.used_tool else 0.0)
    if not buffer:
        return reward
    excess = trajectory.roles.count(SAMPLED) - (max_new_tokens - buffer)
    return reward - penalty * min(max(excess, 0) / buffer, 1.0)


def prefix_advantages(
    rewards: Sequence[float],
    recovered: Mapping[int, bool],
    eps: float = 1e-6,
    prefix_reward: PrefixReward = "original",
    std: float | None = None,
) -> dict[int, float]:
    """Â_prefix of each source: its entry of the group, normalised after r_prefix ∈ {0, 1} replaced its own reward.

    rewards: the group's original N. recovered: index of each source → whether any of its continuations is correct.
    std: as for `group_advantages`.
    """
    if prefix_reward in ("own", "mean"):  # "mean" is known when the continuations' are
        own = group_advantages(rewards, eps, std)
        return {source: float(own[source]) for source in recovered}
    joint = [float(recovered.get(i, reward)) for i, reward in enumerate(rewards)]
    advantages = {}
    for source, success in recovered.items():
        replaced = list(joint if prefix_reward == "joint" else rewards)
        replaced[source] = float(success)
        advantages[source] = float(group_advantages(replaced, eps, std)[source])
    return advantages


def _recoveries(group: Sequence[Trajectory], resamples: Mapping[str, Sequence[Trajectory]]) -> dict[int, bool]:
    return {i: any(c.correct for c in resamples[r.id]) for i, r in enumerate(group) if resamples.get(r.id)}


def _credit_source(
    source: Trajectory, continuations: Sequence[Trajectory], prefix_advantage: float, mask_suffix: bool
) -> None:
    fork = _fork_token(source, continuations)
    if fork == source.prompt_len:
        return
    source.advantages[:fork] = [prefix_advantage if trained else 0.0 for trained in source.loss_mask[:fork]]
    if mask_suffix:
        source.loss_mask[fork:] = [0] * (len(source.tokens) - fork)
        source.advantages[fork:] = [0.0] * (len(source.tokens) - fork)


def _credit_continuations(continuations: Sequence[Trajectory], advantages: np.ndarray) -> None:
    """Â_k = (r_k − mean_K) / std_K over the K continuations alone, on their own tokens."""
    for continuation, advantage in zip(continuations, advantages, strict=True):
        assert continuation.fork_token is not None
        _train(continuation, continuation.fork_token, len(continuation.tokens), advantage)


def _drop_if_equal(trajectories: Sequence[Trajectory]) -> None:
    """Masks trajectories that were normalised together when none of their tokens has anything to learn."""
    if not any(any(trajectory.advantages) for trajectory in trajectories):
        for trajectory in trajectories:
            trajectory.loss_mask = [0] * len(trajectory.tokens)


def _fork_token(source: Trajectory, continuations: Sequence[Trajectory]) -> int:
    """The one index at which all continuations leave their source; ValueError when they disagree with it."""
    forks = {continuation.fork_token for continuation in continuations}
    fork = forks.pop()
    if forks or fork is None or not source.prompt_len <= fork <= len(source.tokens):
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

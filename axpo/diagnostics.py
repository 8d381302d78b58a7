"""The paper's diagnostics of one step, as flat metrics (PAPER.md, "Diagnostics to log and plot")."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

from axpo.explore import Exploration
from axpo.resample import Candidate, all_wrong, rank_correlation, tool_using
from axpo.trajectory import SAMPLED, Trajectory

Groups = Sequence[Sequence[Trajectory]]
Metrics = dict[str, float | None]


def rollout_metrics(groups: Groups) -> Metrics:
    """Rewards, tool use and lengths of the step's original rollouts. None where there is nothing to count."""
    rollouts = [rollout for group in groups for rollout in group]
    with_tool, without = _split(rollouts)
    calls = [call for rollout in rollouts for call in rollout.tool_calls]
    attempted = [subgroup for group in groups if (subgroup := tool_using(group))]
    unaided = [subgroup for group in groups if (subgroup := _split(group)[1])]
    size = max(map(len, groups))
    counts = Counter(len(tool_using(group)) for group in groups)
    return {
        "reward/mean": _mean(rollout.reward for rollout in rollouts),
        "reward/zero_std_fraction": _mean(len({rollout.reward for rollout in group}) == 1 for group in groups),
        "reward/ungraded_rate": _mean(rollout.grade_error is not None for rollout in rollouts),
        "tool/rate": len(with_tool) / len(rollouts),
        "tool/accuracy": _mean(rollout.correct for rollout in with_tool),
        "no_tool/accuracy": _mean(rollout.correct for rollout in without),
        "tool/calls": float(len(calls)),
        "tool/failed_rate": _mean(not call.ok for call in calls),
        "tool/malformed_rate": _mean(call.name is None or call.arguments is None for call in calls),
        "tool/all_wrong_rate": _mean(all_wrong(subgroup) for subgroup in attempted),
        "no_tool/all_wrong_rate": _mean(all_wrong(subgroup) for subgroup in unaided),
        "length/sampled_tokens": _mean(rollout.roles.count(SAMPLED) for rollout in rollouts),
        "length/cut_rate": _mean(rollout.status == "length" for rollout in rollouts),
        "length/turn_limit_rate": _mean(rollout.status == "turn_limit" for rollout in rollouts),
        "credit/untrained_groups": float(sum(not _trained(group) for group in groups)),
        **{f"tool_histogram/{count}": float(counts[count]) for count in range(size + 1)},
    }


def resample_metrics(groups: Groups, resamples: Mapping[str, Sequence[Trajectory]], budget: int) -> Metrics:
    """What resampling did to the all-wrong tool-using subgroups. `budget` is in continuations."""
    continuations = [continuation for branches in resamples.values() for continuation in branches]
    attempted = [subgroup for group in groups if (subgroup := tool_using(group))]
    triggered = [subgroup for subgroup in attempted if all_wrong(subgroup)]
    restored = [subgroup for subgroup in triggered if any(_recovered(rollout, resamples) for rollout in subgroup)]
    distinct = [len({_call_key(branch) for branch in branches}) for branches in resamples.values()]
    return {
        "resample/budget": float(budget),
        "resample/triggered": float(len(triggered)),
        "resample/prefixes": float(len(resamples)),
        "resample/continuations": float(len(continuations)),
        "resample/restore_rate": len(restored) / len(triggered) if triggered else None,
        "resample/success_rate": _mean(continuation.correct for continuation in continuations),
        "resample/distinct_calls": _mean(distinct),
        "resample/collapsed_rate": _mean(count == 1 for count in distinct),
        "credit/untrained_prefixes": float(sum(not _trained(branches) for branches in resamples.values())),
        "tool/all_wrong_rate_after": (len(triggered) - len(restored)) / len(attempted) if attempted else None,
    }


def exploration_metrics(explored: Exploration) -> Metrics:
    """This rank's own: seconds of rolling out and resampling, and of waiting for a tool with nothing to decode.

    `resample/early_rate`: the share of continuations that began before the last rollout ended.
    """
    continuations = sum(map(len, explored.resamples.values()))
    return {
        "perf/explore_s": sum(explored.seconds),
        "perf/tool_wait_s": explored.tool_wait_s,
        "resample/early_rate": explored.early / continuations if continuations else None,
    }


def rank_metrics(candidates: Sequence[Candidate]) -> Metrics:
    """How exact entropy and negated confidence agree on the failed calls that may be resampled."""
    pearson, spearman = rank_correlation(candidates) or (None, None)
    return {"rank/pearson": pearson, "rank/spearman": spearman}


def packing_metrics(
    trajectories: Sequence[Trajectory], micro_batches: Sequence[Sequence[tuple[int, float]]], budget: int
) -> Metrics:
    """How well the step was packed. micro_batches: of each rank, (tokens, operations) of each.

    shared_saving: the share of tokens that packing each trained path alone would have computed on top. efficiency: of
    the token budget of all micro-batches, what they hold. idle_fraction: of the ranks' time in training, what they wait
    for others, as counted in operations: micro-batch i of all ranks runs at the same time.
    """
    alone = sum(len(trajectory.tokens) for trajectory in trajectories if any(trajectory.loss_mask))
    rows = [row for share in micro_batches for row in share]
    tokens, flops = sum(tokens for tokens, _ in rows), sum(flops for _, flops in rows)
    rounds = zip_longest(*micro_batches, fillvalue=(0, 0.0))
    lasting = sum(max(flops for _, flops in row) for row in rounds) * len(micro_batches)
    return {
        "pack/tokens": float(tokens),
        "pack/shared_saving": 1 - tokens / alone if alone else None,
        "pack/micro_batches": float(len(rows)),
        "pack/efficiency": tokens / (len(rows) * budget) if rows else None,
        "pack/flops": flops,
        "pack/idle_fraction": 1 - flops / lasting if lasting else None,
    }


def _trained(trajectories: Sequence[Trajectory]) -> bool:
    return any(any(trajectory.loss_mask) for trajectory in trajectories)


def _recovered(rollout: Trajectory, resamples: Mapping[str, Sequence[Trajectory]]) -> bool:
    return any(continuation.correct for continuation in resamples.get(rollout.id, ()))


def _call_key(trajectory: Trajectory) -> str:
    """Two calls are one when tool and arguments are equal; a malformed call is what was sampled."""
    call = trajectory.first_call
    if call is None or call.arguments is None:
        start = trajectory.fork_token or 0
        return repr(trajectory.tokens[start : call.end if call else None])
    return json.dumps([call.name, call.arguments], sort_keys=True)


def _split(rollouts: Iterable[Trajectory]) -> tuple[list[Trajectory], list[Trajectory]]:
    """(tool-using, others)."""
    both: tuple[list[Trajectory], list[Trajectory]] = ([], [])
    for rollout in rollouts:
        both[not rollout.used_tool].append(rollout)
    return both


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None

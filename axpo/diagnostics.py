"""The paper's diagnostics of one step, as flat metrics (PAPER.md, "Diagnostics to log and plot")."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import numpy as np

from axpo.call_clusters import call_behind_fork, call_clusters, exact_key
from axpo.explore import Exploration
from axpo.resample import Candidate, Trigger, all_wrong, rank_correlation, tool_using, triggered, without_tool
from axpo.trajectory import SAMPLED, ToolCall, Trajectory

Groups = Sequence[Sequence[Trajectory]]
Metrics = dict[str, float | None]


def rollout_metrics(groups: Groups) -> Metrics:
    """Rewards, tool use and lengths of the step's original rollouts. None where there is nothing to count."""
    rollouts = [rollout for group in groups for rollout in group]
    with_tool, without = tool_using(rollouts), without_tool(rollouts)
    calls = [call for rollout in rollouts for call in rollout.tool_calls]
    attempted = [subgroup for group in groups if (subgroup := tool_using(group))]
    unaided = [subgroup for group in groups if (subgroup := without_tool(group))]
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
        "tool/malformed_rate": _mean(_malformed(call) for call in calls),
        "tool/all_wrong_rate": _mean(all_wrong(subgroup) for subgroup in attempted),
        "no_tool/all_wrong_rate": _mean(all_wrong(subgroup) for subgroup in unaided),
        "length/sampled_tokens": _mean(rollout.roles.count(SAMPLED) for rollout in rollouts),
        "length/cut_rate": _mean(rollout.status == "length" for rollout in rollouts),
        "length/turn_limit_rate": _mean(rollout.status == "turn_limit" for rollout in rollouts),
        "credit/untrained_groups": float(sum(not _trained(group) for group in groups)),
        **{f"tool_histogram/{count}": float(counts[count]) for count in range(size + 1)},
    }


def resample_metrics(
    groups: Groups, resamples: Mapping[str, Sequence[Trajectory]], budget: int, trigger: Trigger = "tool"
) -> Metrics:
    """What resampling did to the subgroups of the trigger. `budget` is in continuations.

    A subgroup is restored when a continuation of one of its rollouts is right and, like the subgroup, used a tool or
    did not (under AXPO each does). Without a trigger ("always") the tool-using subgroups are watched.
    """
    continuations = [continuation for branches in resamples.values() for continuation in branches]
    watched: Trigger = "tool" if trigger == "always" else trigger
    subgroups = {kind: [s for group in groups if (s := pick(group))] for kind, pick in _SUBGROUPS.items()}
    fired = [chosen for group in groups if (chosen := triggered(group, watched))]
    calls = [_calls(branches) for branches in resamples.values()]
    calls = [distinct for distinct in calls if distinct is not None]
    return {
        "resample/budget": float(budget),
        "resample/triggered": float(len(fired)),
        "resample/prefixes": float(len(resamples)),
        "resample/continuations": float(len(continuations)),
        "resample/restore_rate": _mean(_restored(subgroup, resamples) for subgroup in fired),
        "resample/success_rate": _mean(continuation.correct for continuation in continuations),
        "resample/distinct_calls": _mean(distinct for distinct, _ in calls),
        "resample/call_clusters": _mean(clusters for _, clusters in calls),
        "resample/collapsed_rate": _mean(clusters == 1 for _, clusters in calls),
        "resample/malformed_rate": _mean(
            _malformed(call) for t in continuations if (call := call_behind_fork(t)) is not None
        ),
        "credit/untrained_prefixes": float(sum(not _trained(branches) for branches in resamples.values())),
        **{
            f"{kind}/all_wrong_rate_after": _mean(all_wrong(s) and not _restored(s, resamples) for s in some)
            for kind, some in subgroups.items()
        },
    }


def tool_metrics(trajectories: Iterable[Trajectory]) -> Metrics:
    """Of each tool that was reached, by rollouts and resamples: calls, errors, timeouts, latency and accuracy.

    A call counts where it was made, not in a continuation that has it from its source. latency is of the call alone,
    without waiting for a worker; accuracy is the share of right trajectories among those that called the tool.
    """
    by_tool: dict[str, list[tuple[ToolCall, Trajectory]]] = {}
    for trajectory in trajectories:
        for call in trajectory.tool_calls:
            if call.seconds is not None and call.name is not None and call.end > (trajectory.fork_token or 0):
                by_tool.setdefault(call.name, []).append((call, trajectory))
    metrics: Metrics = {}
    for name, made in sorted(by_tool.items()):
        seconds = [call.seconds for call, _ in made]
        callers = {trajectory.id: trajectory.correct for _, trajectory in made}
        median, p95 = np.percentile(np.array(seconds, np.float64), (50, 95))
        metrics |= {
            f"tool/{name}/calls": float(len(made)),
            f"tool/{name}/error_rate": _mean(not call.ok for call, _ in made),
            f"tool/{name}/timeout_rate": _mean(call.timed_out for call, _ in made),
            f"tool/{name}/accuracy": _mean(callers.values()),
            f"tool/{name}/latency_median_s": float(median),
            f"tool/{name}/latency_p95_s": float(p95),
        }
    return metrics


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


def _restored(subgroup: Sequence[Trajectory], resamples: Mapping[str, Sequence[Trajectory]]) -> bool:
    kind = subgroup[0].used_tool
    return any(c.correct and c.used_tool == kind for rollout in subgroup for c in resamples.get(rollout.id, ()))


def _calls(continuations: Sequence[Trajectory]) -> tuple[int, int] | None:
    """(different ones, clusters) of the calls that continuations of one prefix made; None when none made a call."""
    made = [(t, call) for t in continuations if (call := call_behind_fork(t)) is not None]
    return (len({exact_key(*one) for one in made}), len(call_clusters(continuations))) if made else None


def _malformed(call: ToolCall) -> bool:
    return call.name is None or call.arguments is None


_SUBGROUPS = {"tool": tool_using, "no_tool": without_tool}


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None

"""The paper's diagnostics and the evaluation's summary, against counting by hand."""

import math
import random

import pytest

from axpo.diagnostics import packing_metrics, resample_metrics, rollout_metrics
from axpo.evaluate import Evaluation, QuestionResult
from axpo.trajectory import SAMPLED
from tests.axpo.factory import random_group, random_resamples


def test_rollout_metrics_count_what_they_say() -> None:
    seed = random.randrange(2**31)
    rng = random.Random(seed)
    groups = [random_group(rng, group, size=6) for group in range(9)]
    m = rollout_metrics(groups)
    rollouts = [r for g in groups for r in g]
    tools = [[r for r in g if r.tool_calls] for g in groups]
    assert m["reward/mean"] == pytest.approx(sum(r.reward for r in rollouts) / 54), seed
    assert m["tool/rate"] == pytest.approx(sum(map(len, tools)) / 54), seed
    wrong = [not any(r.reward for r in t) for t in tools if t]
    assert m["tool/all_wrong_rate"] == (pytest.approx(sum(wrong) / len(wrong)) if wrong else None), seed
    assert sum(m[f"tool_histogram/{n}"] or 0 for n in range(7)) == 9
    assert sum(n * (m[f"tool_histogram/{n}"] or 0) for n in range(7)) == sum(map(len, tools)), seed
    assert m["length/sampled_tokens"] == pytest.approx(sum(r.roles.count(SAMPLED) for r in rollouts) / 54), seed


def test_nothing_to_count_is_none() -> None:
    groups = [random_group(random.Random(0), size=3, tool_rate=0.0)]
    m = rollout_metrics(groups)
    assert m["tool/rate"] == 0
    assert m["tool/accuracy"] is None and m["tool/all_wrong_rate"] is None and m["tool/failed_rate"] is None
    r = resample_metrics(groups, {}, budget=8)
    assert r["resample/triggered"] == 0 and r["resample/restore_rate"] is None and r["resample/budget"] == 8


def test_restore_rate_is_over_triggered_subgroups() -> None:
    rng = random.Random(3)
    groups = [random_group(rng, group, size=4, tool_rate=1.0, success_rate=0.0) for group in range(4)]
    restored = random_resamples(rng, groups[0][0], success_rate=1.0)
    failed = random_resamples(rng, groups[1][2], success_rate=0.0)
    m = resample_metrics(groups, {groups[0][0].id: restored, groups[1][2].id: failed}, budget=8)
    assert m["resample/triggered"] == 4 and m["resample/prefixes"] == 2 and m["resample/continuations"] == 8
    assert m["resample/restore_rate"] == 0.25
    assert m["tool/all_wrong_rate_after"] == 0.75
    assert m["resample/success_rate"] == 0.5


def test_shared_saving() -> None:
    group = random_group(random.Random(5), size=3)
    for rollout in group:
        rollout.loss_mask = [int(role == SAMPLED) for role in rollout.roles]
    alone = sum(len(rollout.tokens) for rollout in group)
    assert packing_metrics(group, [[(alone, 1.0)]], alone)["pack/shared_saving"] == 0
    assert packing_metrics(group, [[(alone // 2, 1.0)]], alone)["pack/shared_saving"] == pytest.approx(0.5, abs=0.02)


def test_packing_metrics() -> None:
    """Two ranks, three micro-batches: of 2·(4 + 2) operations' time, 9 are worked."""
    group = random_group(random.Random(5), size=1)
    group[0].loss_mask = [int(role == SAMPLED) for role in group[0].roles]
    metrics = packing_metrics(group, [[(80, 4.0), (20, 2.0)], [(50, 3.0)]], budget=100)
    assert metrics["pack/tokens"] == 150 and metrics["pack/efficiency"] == 0.5 and metrics["pack/micro_batches"] == 3
    assert metrics["pack/flops"] == 9 and metrics["pack/idle_fraction"] == pytest.approx(1 - 9 / 12)


def test_evaluation_summary() -> None:
    questions = [
        QuestionResult(f"q{i}", [float(i % 4 > k) for k in range(4)], [k < 2 for k in range(4)]) for i in range(40)
    ]
    summary = Evaluation(0, questions).summary()
    assert summary["pass@1"] == pytest.approx(sum(sum(q.rewards) / 4 for q in questions) / 40)
    assert summary["pass@4"] == 0.75 and summary["tool/rate"] == 0.5
    for name in ("pass@1", "pass@4", "tool/rate"):
        low, value, high = (summary[f"{name}{suffix}"] for suffix in ("_low", "", "_high"))
        assert low is not None and value is not None and high is not None
        assert 0 <= low <= value <= high <= 1
    certain = Evaluation(0, [QuestionResult("q", [1.0], [False])] * 20).summary()
    assert certain["pass@1"] == 1 and (certain["pass@1_low"] or 0) < 1
    assert math.isclose(certain["no_tool/accuracy"] or 0, 1) and certain["tool/accuracy"] is None
    again = Evaluation.from_json(Evaluation(3, questions).to_json())
    assert again == Evaluation(3, questions)


def test_a_subgroup_is_restored_by_its_like() -> None:
    """A right answer without a tool does not restore attempts with one, nor the other way round."""
    rng = random.Random(3)
    groups = [random_group(rng, group, size=4, tool_rate=0.5, success_rate=0.0) for group in range(6)]
    mixed = [group for group in groups if len({rollout.used_tool for rollout in group}) == 2]
    assert len(mixed) >= 3
    with_tool, without = (next(r for r in mixed[0] if r.used_tool == kind) for kind in (True, False))
    crossed = {
        source.id: [t for t in random_resamples(rng, source, 40, 1.0, source.prompt_len) if t.used_tool != kind]
        for source, kind in ((with_tool, True), (without, False))
    }
    own = {with_tool.id: [t for t in random_resamples(rng, with_tool, 40, 1.0, with_tool.prompt_len) if t.used_tool]}
    attempted = sum(any(r.used_tool for r in group) for group in groups)
    for trigger in ("tool", "no_tool", "always"):
        m = resample_metrics(groups, crossed, 80, trigger)
        assert m["resample/restore_rate"] == 0 and m["tool/all_wrong_rate_after"] == 1
        assert m["no_tool/all_wrong_rate_after"] == 1 and (m["resample/success_rate"] or 0) == 1
    m = resample_metrics(groups, own, 80, "tool")
    assert m["resample/triggered"] == attempted and m["resample/restore_rate"] == pytest.approx(1 / attempted)
    assert m["tool/all_wrong_rate_after"] == pytest.approx(1 - 1 / attempted)
    assert resample_metrics(groups, own, 80, "no_tool")["resample/restore_rate"] == 0


def test_clusters_of_a_prefix() -> None:
    """Two prefixes: three overlapping boxes and a far one, and one box written four times."""
    rng = random.Random(4)
    group = random_group(rng, size=2, tool_rate=1.0, success_rate=0.0)
    boxes = {
        group[0].id: [[0, 0, 100, 100], [10, 0, 100, 100], [20, 0, 100, 100], [500, 0, 600, 100]],
        group[1].id: [[0, 0, 50, 50]] * 4,
    }
    resamples = {source.id: random_resamples(rng, source) for source in group}
    for source, made in resamples.items():
        for t, box in zip(made, boxes[source], strict=True):
            t.tool_calls[0].arguments = {"bbox_2d": box, "label": "x"}
    m = resample_metrics([group], resamples, 8)
    assert (m["resample/distinct_calls"], m["resample/call_clusters"]) == (2.5, 1.5)
    assert m["resample/collapsed_rate"] == 0.5 and m["resample/malformed_rate"] == 0
    resamples[group[0].id][3].tool_calls[0].arguments = None
    m = resample_metrics([group], resamples, 8)
    assert m["resample/call_clusters"] == 1.5 and m["resample/malformed_rate"] == 0.125

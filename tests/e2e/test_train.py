"""The main job, small: the paper's rules hold in the files that a real run writes."""

import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from axpo.advantage import group_advantages, prefix_advantages
from axpo.resample import prefix_budget
from axpo.trajectory import SAMPLED, Trajectory
from tests.e2e.runs import SMALL, metrics, train, trajectories, without_time
from tests.engine.reference import prefill_logits

STEPS = 6
N, K = SMALL["algo.group_size"], SMALL["algo.resamples_per_prefix"]
BUDGET = prefix_budget(SMALL["algo.budget_ratio"], SMALL["rollout.questions_per_step"], N, K)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(runs: Path) -> Path:
    return train(runs, "whole", STEPS)


def steps(run: Path) -> list[tuple[list[list[Trajectory]], dict[str, list[Trajectory]]]]:
    """(groups, resamples by source) of every step."""
    out = []
    for step in range(1, STEPS + 1):
        groups, resamples = defaultdict(list), defaultdict(list)
        for trajectory in trajectories(run, step):
            if trajectory.parent is None:
                groups[trajectory.group].append(trajectory)
            else:
                resamples[trajectory.parent].append(trajectory)
        out.append(([groups[key] for key in sorted(groups)], dict(resamples)))
    return out


def test_the_run_directory_is_complete(whole: Path) -> None:
    for name in ("config.toml", "metrics.jsonl", "policy/model.safetensors", "policy/config.json", "report.html"):
        assert (whole / name).is_file(), name
    assert [row["step"] for row in metrics(whole)] == list(range(1, STEPS + 1))
    assert (whole / "checkpoints" / f"step_{STEPS:06d}").is_dir()
    assert list((whole / "tensorboard").iterdir())


def test_engine_and_trainer_agree_on_every_trained_token(whole: Path) -> None:
    for row in metrics(whole):
        assert row["mismatch/logprob_diff_max"] < 1e-4, row["step"]


def test_triggers_budget_and_breadth(whole: Path) -> None:
    seen = 0
    for groups, resamples in steps(whole):
        by_id = {rollout.id: rollout for group in groups for rollout in group}
        triggered = [
            g for g in groups if (tools := [r for r in g if r.used_tool]) and not any(t.correct for t in tools)
        ]
        assert len(resamples) <= BUDGET
        assert sum(map(len, resamples.values())) <= SMALL["algo.budget_ratio"] * len(groups) * N
        candidates = sum(r.used_tool and r.confidence is not None for g in triggered for r in g)
        assert len(resamples) == min(BUDGET, candidates), "the budget is used while there are candidates"
        per_question: dict[int, list[Trajectory]] = {group[0].group: [] for group in triggered}
        for source, branches in resamples.items():
            assert len(branches) == K
            per_question[by_id[source].group].append(by_id[source])  # KeyError: a group that was not triggered
        if any(len(chosen) > 1 for chosen in per_question.values()):
            assert all(per_question.values()), "a question got two prefixes while a triggered one has none"
        for group in triggered:
            chosen = {rollout.id for rollout in per_question[group[0].group]}
            ranked = sorted((r for r in group if r.confidence is not None), key=lambda r: r.confidence or 0)
            assert chosen == {rollout.id for rollout in ranked[: len(chosen)]}, "the least confident calls come first"
        seen += len(resamples)
    assert seen > 0, "no prefix was resampled in the whole run: the symptom is missing"


def test_forks_begin_with_their_source(whole: Path) -> None:
    for groups, resamples in steps(whole):
        by_id = {rollout.id: rollout for group in groups for rollout in group}
        for source_id, branches in resamples.items():
            source = by_id[source_id]
            for branch in branches:
                fork = source.tool_calls[0].start + 1
                assert branch.fork_token == fork
                assert branch.tokens[:fork] == source.tokens[:fork]
                assert branch.logprobs[:fork] == source.logprobs[:fork]
                assert branch.tool_calls[0].start == source.tool_calls[0].start


def test_credit_is_the_papers_and_every_token_has_one_source(whole: Path) -> None:
    for groups, resamples in steps(whole):
        for group in groups:
            rewards = [rollout.reward for rollout in group]
            plain = group_advantages(rewards)
            recovered = {i: any(b.correct for b in resamples[r.id]) for i, r in enumerate(group) if r.id in resamples}
            prefixes = prefix_advantages(rewards, recovered)
            for index, rollout in enumerate(group):
                fork = resamples[rollout.id][0].fork_token if rollout.id in resamples else len(rollout.tokens)
                advantage = prefixes.get(index, plain[index])
                check(rollout, 0, fork or 0, advantage)
        for branches in resamples.values():
            for branch, advantage in zip(branches, group_advantages([b.reward for b in branches]), strict=True):
                check(branch, branch.fork_token or 0, len(branch.tokens), advantage)


def check(trajectory: Trajectory, start: int, stop: int, advantage: float) -> None:
    """Exactly the sampled tokens of [start, stop) are trained, with one advantage."""
    for index, role in enumerate(trajectory.roles):
        trained = role == SAMPLED and start <= index < stop
        assert trajectory.loss_mask[index] == int(trained), (trajectory.id, index)
        expected = advantage if trained else 0.0
        assert math.isclose(trajectory.advantages[index], expected, rel_tol=1e-9, abs_tol=1e-12)
        assert (trajectory.logprobs[index] is not None) == (role == SAMPLED)


def test_three_steps_and_a_resume_equal_six(runs: Path, whole: Path) -> None:
    train(runs, "halves", 3)
    halves = train(runs, "halves", STEPS, run__resume="true")
    assert without_time(metrics(halves)) == without_time(metrics(whole))
    for step in range(1, STEPS + 1):
        name = f"trajectories/step_{step:06d}.jsonl"
        assert (halves / name).read_bytes() == (whole / name).read_bytes(), name
    one, other = (load_file(run / "policy" / "model.safetensors") for run in (halves, whole))
    assert all(torch.equal(one[name], other[name]) for name in other) and one.keys() == other.keys()


def test_two_ranks_have_the_losses_of_one(runs: Path, whole: Path) -> None:
    two = train(runs, "two", 2, ranks=2)
    for one_row, two_row in zip(metrics(whole), metrics(two), strict=False):
        for key in ("policy/loss", "policy/grad_norm", "reward/mean", "tool/rate", "resample/prefixes", "policy/kl"):
            assert math.isclose(one_row[key], two_row[key], rel_tol=1e-3, abs_tol=1e-6), (
                key,
                one_row[key],
                two_row[key],
            )
    first, second = ({t.id: t for t in trajectories(run, 1)} for run in (whole, two))
    assert first.keys() == second.keys()
    for name, trajectory in first.items():
        assert trajectory.tokens == second[name].tokens, name
        assert trajectory.advantages == second[name].advantages, name


def test_overlap_rolls_out_with_weights_one_update_old(runs: Path) -> None:
    """Step 2 is sampled before update 1 is seen: as if there had been none. Step 3 is after the evaluation: fresh."""
    evaluated = {"eval__questions": 4, "eval__samples": 1, "eval__every": 2}
    small = {"rollout__questions_per_step": 4, "algo__group_size": 4}
    ahead = train(runs, "ahead", 3, rollout__overlap=True, optim__lr=1e-2, **small, **evaluated)
    frozen = train(runs, "frozen", 2, optim__lr=1e-30, **small)
    for step in (1, 2):
        assert [t.tokens for t in trajectories(ahead, step)] == [t.tokens for t in trajectories(frozen, step)]
    rows = metrics(ahead)
    assert rows[0]["mismatch/logprob_diff_max"] < 1e-4 and rows[2]["mismatch/logprob_diff_max"] < 1e-4
    assert rows[1]["mismatch/logprob_diff_max"] > 1e-2, "update 1 moved nothing, so this shows nothing"


def test_without_budget_axpo_is_grpo_bit_for_bit(runs: Path) -> None:
    axpo = train(runs, "no-budget", 2, algo__budget_ratio=0)
    grpo = train(runs, "grpo", 2, algo__name="grpo")
    assert without_time(metrics(axpo)) == without_time(metrics(grpo))
    one, other = (load_file(run / "policy" / "model.safetensors") for run in (axpo, grpo))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_the_exported_policy_is_a_checkpoint_that_transformers_loads(whole: Path) -> None:
    from transformers import Qwen3VLForConditionalGeneration

    model, info = Qwen3VLForConditionalGeneration.from_pretrained(
        whole / "policy", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    rollout = next(t for t in trajectories(whole, STEPS) if t.parent is None)
    processor_tokens = torch.tensor([rollout.tokens])
    image_token = model.config.image_token_id
    # A text-only stretch is enough here: images are compared in tests/engine/test_parity.py.
    text = processor_tokens[processor_tokens != image_token][None, :40]
    with torch.no_grad():
        expected = model(text, attention_mask=torch.ones_like(text)).logits[0]
    from engine import LLM

    llm = LLM(whole / "policy", kv_cache_bytes=1 << 24)
    actual = prefill_logits(llm, text[0].tolist(), [])
    assert (actual - expected).norm() / expected.norm() < 1e-4

"""Each baseline and ablation is a recipe of a few lines, and changes what it says and nothing else."""

import random
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo.advantage import group_advantages
from axpo.cli import RECIPES, recipe_names, resolve
from axpo.config import Algo, Config
from axpo.trajectory import SAMPLED, Trajectory
from tests.axpo.factory import RESAMPLING, algo_of, credit, random_step

CHANGES: dict[str, dict[str, Any]] = {
    "grpo": {"algo.name": "grpo"},
    "no-rl": {"run.steps": 0},
    "tool-bonus": {"algo.name": "grpo", "algo.tool_reward": 0.1},
    "tool-penalty": {"algo.name": "grpo", "algo.tool_reward": -0.1},
    "double-rollouts": {"algo.name": "grpo", "algo.group_size": 16},
    "cispo": {"algo.name": "grpo", "loss.objective": "cispo", "loss.clip_low": 1.0, "loss.kl_coef": 0.0},
    "arpo": {
        "algo.trigger": "always",
        "algo.fork_at": "observation",
        "algo.rank": "entropy_rise",
        "algo.prefix_reward": "mean",
        "algo.merge_continuations": True,
        "algo.mask_failed_suffix": False,
        "algo.mask_recovered_suffix": False,
    },
    "no-prefix-fix": {"algo.fork_at": "prompt"},
    "no-tool-target": {"algo.trigger": "no_tool", "algo.fork_at": "answer"},
    "random-rank": {"algo.rank": "random"},
    "no-prefix-credit": {"algo.prefix_reward": "own"},
    "merged-group": {"algo.merge_continuations": True},
}
MAIN = ("mini", "qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b")
Step = tuple[list[list[Trajectory]], dict[str, list[Trajectory]]]


@cache
def config(*argv: str) -> Config:
    return resolve(Config, argv, recipe="mini")


def fields(c: Config) -> dict[str, Any]:
    return {f"{s}.{name}": value for s, values in c.model_dump().items() for name, value in values.items()}


def difference(one: Config, other: Config) -> dict[str, Any]:
    """The fields in which they differ, as `other` has them; the run's name aside."""
    before, after = fields(one), fields(other)
    return {name: after[name] for name in after if after[name] != before[name] and name != "run.name"}


@pytest.mark.parametrize("main", MAIN)
@pytest.mark.parametrize("name", CHANGES)
def test_a_recipe_changes_exactly_its_fields(main: str, name: str):
    assert difference(config(main), config(main, name)) == CHANGES[name]
    assert config(main, name).run.name == f"{main}-{name}"
    assert len([line for line in (RECIPES / f"{name}.toml").read_text().splitlines() if line and line[0] != "#"]) <= 8


@pytest.mark.parametrize("main", MAIN)
def test_pairs_are_their_parts(main: str):
    assert config(f"{main}-grpo") == config(main, "grpo")
    based = difference(config(main), config(f"{main}-base"))
    assert list(based) == ["model.path"] and config(f"{main}-base", "grpo").run.name == f"{main}-base-grpo"
    assert {main, f"{main}-grpo", f"{main}-base", *CHANGES} <= set(recipe_names())


def everything(step: Step) -> list[Trajectory]:
    return [t for some in [*step[0], *step[1].values()] for t in some]


def credited(step: Step, algo: Algo) -> dict[str, Trajectory]:
    """The same rollouts and resamples with the credit of another algorithm, by id; without images."""
    groups = [[replace(t, images=[], positions=None) for t in group] for group in step[0]]
    resamples = {source: [replace(t, images=[], positions=None) for t in some] for source, some in step[1].items()}
    credited = deepcopy((groups, resamples))
    credit(*credited, algo)
    return {t.id: t for t in everything(credited)}


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(RESAMPLING))
def test_every_generated_token_is_trained_from_at_most_one_place(seed: int, recipe: str):
    algo = algo_of(recipe)
    step = random_step(seed, algo)
    made = credited(step, algo)
    counts: dict[tuple[str, int], int] = {}
    for t in made.values():
        for i, role in enumerate(t.roles):
            assert t.loss_mask[i] <= (role == SAMPLED) and (t.loss_mask[i] or t.advantages[i] == 0)
            if role == SAMPLED:
                owner = t.id if i >= (t.fork_token or 0) else str(t.parent)
                counts[owner, i] = counts.get((owner, i), 0) + t.loss_mask[i]
    for (owner, i), count in counts.items():
        forked = step[1].get(owner)
        masked = forked and recipe not in ("no-prefix-fix", "arpo") and i >= (forked[0].fork_token or 0)
        assert count == (0 if masked else 1), (owner, i)


def values(t: Trajectory, start: int = 0, end: int | None = None) -> set[float]:
    """The advantages of the trained tokens of [start, end)."""
    return {a for a, on in zip(t.advantages[start:end], t.loss_mask[start:end], strict=True) if on}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_new_rollouts_from_the_prompt_leave_their_source_alone(seed: int):
    algo = algo_of("no-prefix-fix")
    step = random_step(seed, algo)
    made, grpo = credited(step, algo), credited((step[0], {}), algo)
    for group in step[0]:
        for rollout in group:
            assert made[rollout.id] == grpo[rollout.id], "plain GRPO"
    for source, continuations in step[1].items():
        advantages = group_advantages([c.reward for c in continuations])
        for c, advantage in zip(continuations, advantages, strict=True):
            assert c.fork_token == made[source].prompt_len
            assert values(made[c.id]) == {float(advantage)}
            assert sum(made[c.id].loss_mask) == c.roles.count(SAMPLED), "all that it sampled"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_arpo_normalises_all_branches_together_and_averages_what_they_share(seed: int):
    algo = algo_of("arpo")
    step = random_step(seed, algo)
    made = credited(step, algo)
    for group in step[0]:
        branches = [c for rollout in group for c in step[1].get(rollout.id, ())]
        members = [*group, *branches]
        of = dict(zip([t.id for t in members], group_advantages([t.reward for t in members]), strict=True))
        for rollout in group:
            children = step[1].get(rollout.id, [])
            fork = children[0].fork_token if children else 0
            shared = np.mean([of[rollout.id], *(of[c.id] for c in children)])
            assert values(made[rollout.id], 0, fork) <= {float(shared)}
            assert values(made[rollout.id], fork or 0) == {float(of[rollout.id])}
            for c in children:
                assert values(made[c.id]) == {float(of[c.id])}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_without_prefix_credit_only_prefixes_differ(seed: int):
    step = random_step(seed, algo_of("mini"))
    full, without = credited(step, algo_of("mini")), credited(step, algo_of("no-prefix-credit"))
    for group in step[0]:
        plain = dict(zip([r.id for r in group], group_advantages([r.reward for r in group]), strict=True))
        for rollout in group:
            one, other = full[rollout.id], without[rollout.id]
            assert one.loss_mask == other.loss_mask
            if rollout.id not in step[1]:
                assert one == other
            else:
                assert values(other) == {float(plain[rollout.id])}
                recovered = any(c.correct for c in step[1][rollout.id])
                assert one == other or recovered, "sources are wrong: nothing changes without a recovery"
    for continuations in step[1].values():
        assert all(full[c.id] == without[c.id] for c in continuations)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_a_merged_group_changes_advantages_of_resampled_questions_alone(seed: int):
    step = random_step(seed, algo_of("mini"))
    apart, merged = credited(step, algo_of("mini")), credited(step, algo_of("merged-group"))
    for group in step[0]:
        family = [*group, *(c for r in group for c in step[1].get(r.id, ()))]
        joint = dict(zip([t.id for t in family], group_advantages([t.reward for t in family]), strict=True))
        for t in family:
            assert apart[t.id].loss_mask == merged[t.id].loss_mask
            if t.id not in step[1]:
                assert values(merged[t.id]) == {float(joint[t.id])}
            if len(family) == len(group):
                assert apart[t.id] == merged[t.id]


@pytest.mark.parametrize(("recipe", "sign"), [("tool-bonus", 1), ("tool-penalty", -1)])
def test_a_tool_reward_moves_mixed_groups_alone(recipe: str, sign: int):
    seed = random.getrandbits(32)
    step = random_step(seed, algo_of("mini"), groups=40)[0], {}
    plain, shaped = credited(step, algo_of("grpo")), credited(step, algo_of(recipe))
    seen = set()
    for group in step[0]:
        mixed = len({rollout.used_tool for rollout in group}) == 2
        seen.add(mixed)
        shift = {True: [], False: []}
        for rollout in group:
            one, other = plain[rollout.id], shaped[rollout.id]
            assert one.loss_mask == other.loss_mask
            shift[rollout.used_tool].append(max(values(other)) - max(values(one)))
        if mixed and len({rollout.reward for rollout in group}) == 1:
            assert min(sign * x for x in shift[True]) > 0 > max(sign * x for x in shift[False]), f"seed {seed}"
        if not mixed:
            assert np.allclose([*shift[True], *shift[False]], 0), f"seed {seed}"
    assert seen == {True, False}, f"seed {seed}"

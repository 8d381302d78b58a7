"""Micro-batches: whole trees under the budget, every tree once, ranks evenly loaded, one rank as before."""

import random

import numpy as np
import pytest

from axpo.flops import training_flops
from axpo.packing import first_fit, plan_rounds
from axpo.tree import PackedBatch, build_trees, concatenate
from engine.models import ModelConfig
from tests.axpo.factory import IMAGE, random_group, write_checkpoint


def rows_of(rounds: list[list[list[int]]]) -> list[list[int]]:
    return [row for some in rounds for row in some if row]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_tree_once_under_the_budget(ranks: int):
    seed = random.getrandbits(32)
    rng = np.random.default_rng(seed)
    for _ in range(50):
        count, budget = int(rng.integers(1, 60)), 1000
        sizes = rng.integers(20, rng.integers(100, 1200), count).tolist()
        costs = [size * rng.uniform(1, 2) for size in sizes]
        rounds = plan_rounds(sizes, costs, sorted(rng.integers(0, ranks, count).tolist()), budget, ranks)
        rows = rows_of(rounds)
        assert sorted(tree for row in rows for tree in row) == list(range(count)), f"seed {seed}"
        assert all(sum(sizes[tree] for tree in row) <= budget or len(row) == 1 for row in rows), f"seed {seed}"
        assert all(len(some) == ranks for some in rounds)
        assert all(row for some in rounds[:-1] for row in some), f"only the last round may leave a rank idle, {seed}"
        assert len(rounds) == -(-len(first_fit(sizes, budget)) // ranks), f"no more rounds than needed, seed {seed}"


def test_one_rank_keeps_the_rows_of_first_fit():
    rng = random.Random(3)
    sizes = [rng.randint(10, 500) for _ in range(40)]
    costs = [rng.random() for _ in sizes]
    assert rows_of(plan_rounds(sizes, costs, [0] * 40, 800, 1)) == first_fit(sizes, 800)


def test_ranks_are_balanced_by_cost():
    """Rank 0 drew all the dear trees; after packing the slowest rank has at most 5 % more than the mean."""
    rng = random.Random(4)
    ranks, count = 4, 64
    owners = sorted(index % ranks for index in range(count))
    sizes = [rng.randint(80, 160) for _ in owners]
    costs = [size * rng.uniform(0.8, 1.2) * (5 if owner == 0 else 1) for size, owner in zip(sizes, owners, strict=True)]
    before = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
    rounds = plan_rounds(sizes, costs, owners, 2000, ranks)
    after = sum(max(sum(costs[tree] for tree in row) for row in some) for some in rounds)
    assert max(before) / (sum(costs) / ranks) > 2 and after / (sum(costs) / ranks) < 1.05


def test_trees_stay_where_they_are_when_all_is_even():
    owners = [rank for rank in range(4) for _ in range(3)]
    rounds = plan_rounds([100] * 12, [1.0] * 12, owners, 300, 4)
    assert [[owners[tree] for tree in row] for row in rounds[0]] == [[rank] * 3 for rank in range(4)]


def test_cost_is_additive_and_counts_what_it_should(tmp_path):
    config = ModelConfig.from_pretrained(write_checkpoint(tmp_path / "policy"))
    rng = random.Random(5)
    trees: list[PackedBatch] = []
    for number in range(3):
        group = random_group(rng, number)
        for rollout in group:
            rollout.loss_mask = [int(role == 1) for role in rollout.roles]
        trees += build_trees(group, {}, IMAGE)
    total = training_flops(config, concatenate(trees))
    assert total == pytest.approx(sum(training_flops(config, tree) for tree in trees), rel=1e-12)

    tree = trees[0]
    text, vision = config.text, config.vision
    assert vision is not None
    visible = sum(1 for i in range(tree.num_tokens) for t in range(i + 1) if i < tree.subtree_end[t])
    weights = sum((32 * 32, 2 * 32 * 16, 32 * 32, 3 * 32 * 48))  # q, k and v, o, the MLP
    forward = 2 * text.num_layers * weights * tree.num_tokens + 4 * text.num_layers * 32 * visible
    forward += 2 * 32 * 48 * len(tree.labels)
    patches = [image.grid_thw[1] * image.grid_thw[2] for image in tree.images]
    block = 2 * (3 * 16 * 16 + 16 * 16 + 2 * 16 * 24)
    merger = 2 * (64 * 64 + 64 * 32) / 4  # of four patches
    encode = sum(p * (2 * vision.patch_dim * 16 + 2 * block + 2 * merger) + 2 * 4 * 16 * p * p for p in patches)
    assert training_flops(config, tree) == pytest.approx(3 * (forward + encode))
    assert training_flops(config, tree, freeze_vision=True) == pytest.approx(3 * forward + encode)

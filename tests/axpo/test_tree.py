"""Packed trees: every trained token sees exactly its own path, nothing is computed twice or for nothing."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo.advantage import assign_credit
from axpo.packing import pack_trees
from axpo.trajectory import Trajectory
from axpo.tree import PackedBatch, build_trees
from tests.axpo.factory import IMAGE, RESAMPLING, algo_of, credit, random_group, random_step

Resamples = dict[str, list[Trajectory]]


def credited_step(seed: int, recipe: str = "mini") -> tuple[list[list[Trajectory]], Resamples]:
    algo = algo_of(recipe)
    groups, resamples = random_step(seed, algo, groups=2)
    credit(groups, resamples, algo)
    return groups, resamples


def path(batch: PackedBatch, index: int) -> list[int]:
    """Packed indices from the root to `index`."""
    out = []
    while index >= 0:
        out.append(index)
        index = int(batch.prev[index])
    return out[::-1]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(RESAMPLING), st.sampled_from([60, 250, 10_000]), st.booleans())
def test_trained_tokens_see_their_own_path_and_nothing_else(seed: int, recipe: str, budget: int, sequence: bool):
    groups, resamples = credited_step(seed, recipe)
    aggregation = "sequence" if sequence else "token"
    trees = [t for g in groups for t in build_trees(g, resamples, IMAGE, aggregation=aggregation, budget=budget)]
    found: Counter = Counter()
    total_weight = 0.0
    for batch in pack_trees(trees, budget):
        pixels = {}
        offset = 0
        for image in batch.images:
            for index in batch.image_token_index[offset : offset + image.num_tokens].tolist():
                pixels[index] = image.key
            offset += image.num_tokens
        assert offset == len(batch.image_token_index) == int((batch.input_ids == IMAGE).sum())
        index = torch.arange(batch.num_tokens)
        needed = set()
        for m, predictor in enumerate(batch.predict_index.tolist()):
            along = path(batch, predictor)
            visible = index[(index <= predictor) & (predictor < batch.subtree_end)].tolist()
            assert visible == along
            needed |= set(along)
            seen = (
                tuple(batch.input_ids[along].tolist()),
                batch.position_ids[:, along].numpy().tobytes(),
                tuple(pixels[i] for i in along if i in pixels),
            )
            values = (batch.labels[m], batch.old_logprobs[m], batch.advantages[m], batch.weights[m])
            found[seen, tuple(v.item() for v in values)] += 1
            total_weight += batch.weights[m].item()
        assert needed == set(range(batch.num_tokens)), "a computed token that no trained token depends on"
    expected: Counter = Counter()
    sequences = 0
    for trajectory in [t for group in [*groups, *resamples.values()] for t in group]:
        count = sum(trajectory.loss_mask)
        sequences += count > 0
        keys = [image.key for image in trajectory.images for _ in range(image.num_tokens)]
        positions = trajectory.positions
        assert positions is not None
        for i in [i for i, trained in enumerate(trajectory.loss_mask) if trained]:
            before = trajectory.tokens[:i]
            seen = (tuple(before), np.ascontiguousarray(positions[:, :i]).tobytes(), tuple(keys[: before.count(IMAGE)]))
            values = (trajectory.logprobs[i], trajectory.advantages[i], 1 / count if sequence else 1.0)
            expected[seen, (trajectory.tokens[i], *np.array(values, np.float32).tolist())] += 1
    assert found == expected
    assert total_weight == pytest.approx(sequences if sequence else sum(expected.values()), rel=1e-5)


def test_one_tree_computes_no_path_twice():
    """Two packed tokens never have the same path, unless two rollouts sampled the same tokens after a fork."""
    seed = next(seed for seed in range(100) if sum(k.startswith("0.") for k in credited_step(seed)[1]) == 3)
    groups, resamples = credited_step(seed)
    (tree,) = build_trees(groups[0], resamples, IMAGE)
    prompt = groups[0][0].tokens[: groups[0][0].prompt_len]
    paths = Counter(tuple(tree.input_ids[path(tree, i)].tolist()) for i in range(tree.num_tokens))
    prompts = [count for p, count in paths.items() if len(p) <= len(prompt)]
    assert prompts == [1] * len(prompt)
    separate = sum(len(t.tokens) for t in groups[0]) + sum(
        len(t.tokens) for r in groups[0] for t in resamples.get(r.id, [])
    )
    assert tree.num_tokens < separate / 2
    for source in [r for r in groups[0] if r.id in resamples]:
        fork = resamples[source.id][0].fork_token
        assert fork and paths[tuple(source.tokens[:fork])] == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 400))
def test_packing_keeps_the_budget_and_is_deterministic(seed: int, budget: int):
    groups, resamples = credited_step(seed)
    trees = [tree for group in groups for tree in build_trees(group, resamples, IMAGE, budget=budget)]
    batches = pack_trees(trees, budget)
    whole = {tree.num_tokens for tree in trees if tree.num_tokens > budget}
    assert all(batch.num_tokens <= budget or batch.num_tokens in whole for batch in batches)
    assert sum(batch.num_tokens for batch in batches) == sum(tree.num_tokens for tree in trees)
    for a, b in zip(batches, pack_trees(trees, budget), strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.predict_index, b.predict_index)


def test_a_plain_sequence():
    """SFT: a single trajectory is a one-path tree; its last token is a label only."""
    trajectory = random_group(random.Random(3), size=1, tool_rate=1.0)[0]
    trajectory.logprobs = [None] * len(trajectory.tokens)
    assign_credit([[trajectory]], {})
    (tree,) = build_trees([trajectory], {}, IMAGE)
    assert tree.input_ids.tolist() == trajectory.tokens[:-1]
    assert tree.prev.tolist() == list(range(-1, tree.num_tokens - 1))
    assert set(tree.subtree_end.tolist()) == {tree.num_tokens}
    assert tree.old_logprobs.isnan().all()
    assert (tree.predict_index + 1).tolist() == [i for i, trained in enumerate(trajectory.loss_mask) if trained]
    trajectory.loss_mask = [0] * len(trajectory.tokens)
    assert build_trees([trajectory], {}, IMAGE) == [] and pack_trees([], 100) == []


def test_what_does_not_fit_is_named():
    a, b = random_group(random.Random(1), size=2)
    assign_credit([[a, b]], {})
    other = random_group(random.Random(2), size=1)[0]
    assign_credit([[other]], {})
    with pytest.raises(ValueError, match="different prompts"):
        build_trees([a, other], {}, IMAGE)
    with pytest.raises(ValueError, match="no positions"):
        build_trees([replace(a, positions=None)], {}, IMAGE)
    with pytest.raises(ValueError, match="image tokens"):
        build_trees([replace(a, images=a.images[1:])], {}, IMAGE)
    with pytest.raises(ValueError, match="prompt token"):
        build_trees([replace(a, loss_mask=[1, *a.loss_mask[1:]])], {}, IMAGE)

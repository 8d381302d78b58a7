"""Trigger, candidates, ranking and the breadth-first budget, against a brute-force oracle."""

import itertools
import math
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo.resample import (
    Candidate,
    PrefixBoard,
    all_wrong,
    find_candidates,
    prefix_budget,
    rank_correlation,
    select_prefixes,
    tool_using,
)
from axpo.trajectory import ToolCall
from tests.axpo.factory import OPEN, random_group

levels = st.sampled_from([0.1, 0.2, 0.2, 0.5, 0.9])
pools = st.lists(st.tuples(st.integers(0, 5), levels, levels), max_size=14)


def make(pool: list[tuple[int, float, float]]) -> list[Candidate]:
    counters: dict[int, itertools.count] = {}
    out = []
    for group, confidence, entropy in pool:
        rollout = next(counters.setdefault(group, itertools.count()))
        out.append(Candidate(group, rollout, f"{group}.{rollout}", 7, confidence, entropy))
    return out


@settings(max_examples=300, deadline=None)
@given(pools, st.integers(0, 12), st.sampled_from(["confidence", "entropy"]), st.booleans(), st.randoms())
def test_selection_against_an_oracle(pool, budget, rank, by_rank, shuffle):
    """The oracle grows the selection one prefix at a time straight from the rules."""
    candidates = make(pool)

    def score(c: Candidate) -> float:
        return c.confidence if rank == "confidence" else -c.entropy

    best = {c.group: min(score(d) for d in candidates if d.group == c.group) for c in candidates}
    expected: list[Candidate] = []
    while len(expected) < min(budget, len(candidates)):
        left = [c for c in candidates if c not in expected]
        taken = {c.group: sum(d.group == c.group for d in expected) for c in left}
        fewest = min(taken.values())
        group = min((best[g] if by_rank else 0, g) for g, n in taken.items() if n == fewest)[1]
        expected.append(min((c for c in left if c.group == group), key=lambda c: (score(c), c.rollout)))
    shuffled = list(candidates)
    shuffle.shuffle(shuffled)
    order = "rank" if by_rank else "data"
    assert select_prefixes(shuffled, budget, rank=rank, question_order=order) == expected


@settings(max_examples=200, deadline=None)
@given(pools, st.integers(0, 12), st.sampled_from(["confidence", "entropy", "random"]), st.integers(), st.randoms())
def test_breadth_first_within_budget(pool, budget, rank, seed, shuffle):
    candidates = make(pool)
    selected = select_prefixes(candidates, budget, rank=rank, seed=seed, step=3)
    assert len(selected) == len(set(selected)) == min(budget, len(candidates))
    taken = {c.group: sum(s.group == c.group for s in selected) for c in candidates}
    available = {c.group: sum(d.group == c.group for d in candidates) for c in candidates}
    for a, b in itertools.permutations(taken, 2):
        assert taken[a] <= taken[b] + 1 or taken[b] == available[b], "a second prefix while another question had none"
    shuffled = list(candidates)
    shuffle.shuffle(shuffled)
    assert select_prefixes(shuffled, budget, rank=rank, seed=seed, step=3) == selected


@settings(max_examples=300, deadline=None)
@given(
    pools,
    st.integers(0, 12),
    st.sampled_from(["confidence", "entropy", "random"]),
    st.sampled_from(["rank", "data"]),
    st.permutations(range(6)),
)
def test_a_board_decides_early_what_the_rule_decides_late(pool, budget, rank, question_order, finished):
    """Whatever the order in which groups end: nothing is taken back, and at the end it is the rule's selection."""
    candidates = make(pool)
    select = partial(select_prefixes, rank=rank, question_order=question_order, seed=1, step=2)
    final = set(select(candidates, budget))
    board = PrefixBoard(6, 14, budget, select)
    before: set[Candidate] = set()
    for group in finished:
        board.finish(group, [c for c in candidates if c.group == group])
        assert before <= board.selected <= final and not board.selected & board.open
        known = {c for c in board.candidates if c in final}
        assert known <= board.selected | board.open, "a prefix was given up that the rule selects"
        before = set(board.selected)
    assert board.selected == final and not board.open


def test_a_board_does_not_wait_for_a_group_that_cannot_matter():
    """Two prefixes to give and two groups left: the best candidate so far may go only when one of them has ended."""
    first, second = make([(0, 0.2, 0.0), (1, 0.5, 0.0)])
    board = PrefixBoard(4, 8, 3, select_prefixes)
    board.finish(0, [first])
    assert board.selected == set() and board.open == {first}
    board.finish(1, [second])
    assert board.selected == {first} and board.open == {second}
    board.finish(2, [])
    assert board.selected == {first, second} and not board.open


def test_random_rank_depends_on_seed_and_step():
    candidates = make([(g, 0.5, 0.5) for g in range(30)])
    first = select_prefixes(candidates, 10, rank="random", seed=1, step=1)
    assert first == select_prefixes(candidates, 10, rank="random", seed=1, step=1)
    assert first != select_prefixes(candidates, 10, rank="random", seed=1, step=2)
    assert first != select_prefixes(candidates, 10, rank="random", seed=2, step=1)
    with pytest.raises(ValueError, match=r"algo\.rank"):
        select_prefixes(candidates, 10, rank="luck")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("ratio", "questions", "group_size", "k", "expected"),
    [(0.25, 64, 8, 4, 32), (0.25, 3, 8, 4, 1), (0.0, 64, 8, 4, 0), (0.29, 100, 1, 1, 29), (0.25, 1, 8, 4, 0)],
)
def test_budget(ratio: float, questions: int, group_size: int, k: int, expected: int):
    assert prefix_budget(ratio, questions, group_size, k) == expected
    assert expected * k <= ratio * questions * group_size + 1e-9


def test_trigger_and_candidates():
    rng = random.Random(random.getrandbits(32))
    group = [replace(r, reward=0.0) for r in random_group(rng, group=4, size=6, tool_rate=1.0)]
    group[1].tool_calls = []
    group[1].reward = 1.0
    assert all_wrong(tool_using(group)), "a correct rollout without a tool does not lift the trigger"
    found = find_candidates([group])
    assert [c.rollout for c in found] == [0, 2, 3, 4, 5]
    for c in found:
        source = group[c.rollout]
        call = source.first_call
        assert call and source.tokens[c.fork_token - 1] == OPEN and c.source == source.id and c.group == 4
        inside = range(call.start + 1, call.end)
        assert c.confidence == pytest.approx(np.mean([math.exp(source.logprobs[i] or 0) for i in inside]))
        assert c.entropy == pytest.approx(np.mean([source.entropies[i] or 0 for i in inside]))
    group[3].reward = 1.0
    assert find_candidates([group]) == [] and not all_wrong([])


def test_malformed_and_unclosed_calls_are_attempts():
    rng = random.Random(9)
    malformed, unclosed, cut = (replace(r, reward=0.0) for r in random_group(rng, size=3, tool_rate=1.0))
    malformed.tool_calls = [replace(malformed.tool_calls[0], name=None, arguments=None, ok=False, error="not JSON")]
    call = unclosed.tool_calls[0]
    unclosed.tool_calls = [ToolCall(None, None, False, "never closed", 0, call.start, call.end - 1)]
    call = cut.tool_calls[0]
    arrays = ("tokens", "roles", "loss_mask", "logprobs", "entropies", "advantages")
    at_limit = {name: getattr(cut, name)[: call.start + 1] for name in arrays}
    calls = [ToolCall(None, None, False, "never closed", 0, call.start, call.start + 1)]
    cut = replace(cut, **at_limit, status="length", tool_calls=calls)
    assert len(tool_using([malformed, unclosed, cut])) == 3
    assert [c.source for c in find_candidates([[malformed, unclosed, cut]])] == [malformed.id, unclosed.id]


def test_a_call_that_was_not_sampled_is_refused():
    rollout = replace(random_group(random.Random(2), size=1, tool_rate=1.0)[0], reward=0.0)
    rollout.logprobs[rollout.tool_calls[0].start + 1] = None
    with pytest.raises(ValueError, match="not sampled"):
        find_candidates([[rollout]])


def test_rank_correlation():
    seed = random.getrandbits(32)
    rng = np.random.default_rng(seed)
    confidence = rng.random(40).round(1)
    entropy = (1 - confidence + rng.normal(size=40)).round(1)
    pool = [
        Candidate(i, 0, "", 1, float(c), float(h)) for i, (c, h) in enumerate(zip(confidence, entropy, strict=True))
    ]
    correlation = rank_correlation(pool)
    assert correlation is not None
    assert correlation[0] == pytest.approx(np.corrcoef(entropy, -confidence)[0, 1], rel=1e-9), f"seed {seed}"
    smaller = (entropy[:, None] > entropy).sum(1) + (entropy[:, None] == entropy).sum(1) / 2
    larger = (confidence[:, None] < confidence).sum(1) + (confidence[:, None] == confidence).sum(1) / 2
    assert correlation[1] == pytest.approx(np.corrcoef(smaller, larger)[0, 1], rel=1e-9), f"seed {seed}"
    assert rank_correlation(pool[:1]) is None
    assert rank_correlation([replace(c, entropy=1.0) for c in pool]) is None

"""The sharing plan: every key that a row sees is read once, from the right block, in any tree; and at what cost."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.paged_attention import PagedTile, PlanOverflow
from kernels.paged_attention.plan import HEADER, ITEM, ROW, WorkList, build, fixed_plan, upload

CPU = torch.device("cpu")


@st.composite
def steps(draw):
    """Tables of a random forest of forks, any number of groups and levels; lengths and queries of every kind."""
    block_size = draw(st.sampled_from([4, 8, 16]))
    split = draw(st.sampled_from([16, 32]))
    group = draw(st.sampled_from([1, 2, 3, 4, 8]))
    tile = PagedTile(16, split, draw(st.sampled_from([1, 4, 1000])))
    tables: list[list[int]] = []
    contexts, queries, fresh = [], [], 0
    for _ in range(draw(st.integers(0, 12))):
        context = draw(st.integers(1, 150))
        blocks = -(-context // block_size)
        parent = draw(st.integers(-1, len(tables) - 1))
        kept = draw(st.integers(0, min(blocks, len(tables[parent])))) if parent >= 0 else 0
        tables.append((tables[parent][:kept] if parent >= 0 else []) + list(range(fresh, fresh + blocks - kept)))
        fresh += blocks - kept
        contexts.append(context)
        queries.append(min(context, draw(st.sampled_from([0, 1, 1, 1, 2, 5, 40, 150]))))
    order = draw(st.permutations(range(len(tables))))
    table = np.full((len(tables), max([1, *map(len, tables)])), 0, dtype=np.int32)
    for row, s in enumerate(order):
        table[row, : len(tables[s])] = tables[s]
    starts = np.cumsum([0, *(queries[s] for s in order)]).astype(np.int32)
    return table, starts, np.array([contexts[s] for s in order], dtype=np.int32), tile, group, block_size


def plan_of(step, share: bool, head_dim: int = 64) -> WorkList:
    tables, starts, contexts, tile, group, block_size = step
    return build(tables, starts, contexts, tile, group, 2, head_dim, block_size, 2, share)


def cells(tables: np.ndarray, sequence: int, keys: np.ndarray, block_size: int) -> np.ndarray:
    return tables[sequence, keys // block_size] * block_size + keys % block_size


@settings(deadline=None, max_examples=150)
@given(steps(), st.booleans())
def test_every_visible_key_is_covered_once_from_the_rows_own_blocks(step, share):
    tables, starts, contexts, tile, group, block_size = step
    work = plan_of(step, share)
    tokens = np.diff(starts)
    owner = np.arange(len(tokens)).repeat(tokens)
    position = np.concatenate([np.arange(c - n, c) for c, n in zip(contexts, tokens, strict=True)] or [[]])
    assert sorted(work.rows[:, 0]) == list(range(starts[-1]))
    assert np.array_equal(work.rows[:, 1], position[work.rows[:, 0]])
    covered = [[] for _ in work.rows]  # cells that each row reads, by the items in any order
    read = [set() for _ in work.rows]  # splits
    for begin, count, table, first, end, key_end, direct, _ in work.items:
        assert 0 < count <= tile.rows // group
        assert first < end and first * tile.split < key_end <= end * tile.split  # whole splits, or up to the end of all
        assert direct == (begin >= work.merged) and (first == 0 if direct else end == first + 1)
        keys = np.arange(first * tile.split, key_end)
        for x in range(begin, begin + count):
            seen = keys[keys <= work.rows[x, 1]]
            covered[x].extend(cells(tables, table, seen, block_size))
            read[x] |= {int(key) // tile.split for key in seen}
    for x, (token, at, partial) in enumerate(work.rows):
        assert sorted(covered[x]) == sorted(cells(tables, owner[token], np.arange(at + 1), block_size))
        assert len(set(covered[x])) == at + 1
        assert read[x] == set(range(at // tile.split + 1))
        assert (partial >= 0) == (x < work.merged)
    # The partials of a row are neighbours, those of different rows do not meet, and none is left over.
    slots = [p + s for _, at, p in work.rows[: work.merged] for s in range(at // tile.split + 1)]
    assert sorted(slots) == list(range(work.partials))


def bytes_read(work: WorkList, split: int) -> int:
    return int((work.items[:, 5] - work.items[:, 3] * split).sum())


@settings(deadline=None, max_examples=100)
@given(steps())
def test_sharing_never_reads_more_and_never_wastes_a_merge(step):
    tile, group = step[3], step[4]
    shared, alone = plan_of(step, True), plan_of(step, False)
    saved = (bytes_read(alone, tile.split) - bytes_read(shared, tile.split)) * 2 * 64 * 2
    merged = (shared.partials - alone.partials) * group * 65 * 8
    assert saved >= 0
    assert saved > merged or shared.partials <= alone.partials


def forks(prefix: int, count: int, own: int, block_size: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blocks, tail = prefix // block_size, -(-own // block_size)
    tables = np.zeros((count, blocks + tail), dtype=np.int32)
    tables[:, :blocks] = np.arange(blocks)
    tables[:, blocks:] = blocks + np.arange(count * tail).reshape(count, tail)
    return tables, np.arange(count + 1, dtype=np.int32), np.full(count, prefix + own, dtype=np.int32)


H100 = PagedTile(64, 512, 264)


def test_sixteen_forks_of_8k_read_the_prefix_once():
    """The shape of the H100 target: sixteen prefix items of full tiles and sixteen tails, for eight KV heads."""
    work = build(*forks(8192, 16, 512), H100, 4, 8, 128, 16, 2)
    assert len(work.items) == 32 and work.merged == 16 and work.partials == 16 * 17
    assert (work.items[:, 1] == 16).sum() == 16 and (work.items[:, 1] == 1).sum() == 16
    assert len(build(*forks(8192, 16, 512), H100, 4, 8, 128, 16, 2, share=False).items) == 16 * 17


def test_levels_nest():
    """Four forks of a prefix of two splits, each forked four times after a split of its own."""
    tables, starts, contexts = forks(1024, 16, 1024)
    tables[:, 64:96] = tables[::4, 64:96].repeat(4, axis=0)  # the third split is common to four
    order = np.random.default_rng().permutation(16)  # sharing needs no order of the batch
    work = build(tables[order], starts, contexts, PagedTile(64, 512, 1), 4, 8, 128, 16, 2)
    rows_by_split = {s: sorted(work.items[work.items[:, 3] == s, 1]) for s in range(4)}
    assert rows_by_split == {0: [16], 1: [16], 2: [4] * 4, 3: [1] * 16}


def test_a_level_that_saves_less_than_its_merge_is_not_shared():
    tile = PagedTile(64, 64, 1)  # one program: nothing is split up for the sake of balance
    for prefix, own, merged in ((64, 600, 0), (576, 16, 2)):  # 1 split of 11 in common, 9 of 10
        tables, starts, contexts = forks(prefix, 2, own)
        assert build(tables, starts, contexts, tile, 4, 8, 128, 16, 2).merged == merged


def test_long_rows_are_split_for_balance_and_full_tiles_are_not():
    tables, starts, contexts = forks(0, 1, 8192)
    one = build(tables, starts, contexts, H100, 4, 8, 128, 16, 2)
    assert len(one.items) == 16 and one.merged == 1
    prefill = build(tables, np.array([0, 8192], dtype=np.int32), contexts, H100, 4, 8, 128, 16, 2)
    assert prefill.merged == 0 and len(prefill.items) == 512


def test_a_large_step_is_planned_in_milliseconds():
    tables, starts, contexts = forks(30_000, 256, 2_000)
    build(tables, starts, contexts, H100, 4, 8, 128, 16, 2)
    start = time.perf_counter()
    work = build(tables, starts, contexts, H100, 4, 8, 128, 16, 2)
    assert time.perf_counter() - start < 0.5  # about 15 ms on a quiet core
    assert work.merged == 256


def test_a_fixed_plan_is_rewritten_in_place_and_says_when_it_is_too_small():
    tile = PagedTile(64, 512, 264)
    fixed = fixed_plan(16, 9000, tile, CPU)
    assert fixed.buffer is not None
    address = fixed.buffer.data_ptr()
    for count in (16, 3):
        work = build(*forks(8192, count, 512), tile, 4, 8, 128, 16, 2)
        assert upload(work, tile, CPU, True, fixed) is fixed and fixed.buffer.data_ptr() == address
        assert fixed.buffer[:2].tolist() == [len(work.items), work.merged]
        rows = fixed.buffer[HEADER : HEADER + ROW * 16].view(ROW, 16)[:, :count]
        assert np.array_equal(rows.T.numpy(), work.rows)
        items = fixed.buffer[HEADER + ROW * 16 :][: work.items.size].view(-1, ITEM)
        assert np.array_equal(items.numpy(), work.items)
    with pytest.raises(PlanOverflow, match="17 rows"):
        upload(build(*forks(8192, 17, 512), tile, 4, 8, 128, 16, 2), tile, CPU, True, fixed)
    with pytest.raises(PlanOverflow, match="do not fit"):
        upload(build(*forks(16384, 16, 512), tile, 4, 8, 128, 16, 2), tile, CPU, True, fixed)


def test_an_empty_step():
    work = build(np.zeros((0, 1)), np.zeros(1), np.zeros(0), H100, 4, 8, 128, 16, 2)
    assert len(work.items) == len(work.rows) == work.partials == 0

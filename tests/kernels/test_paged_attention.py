"""paged_attention against float64 over shuffled block tables, and bitwise independence of everything but the row."""

import numpy as np
import pytest
import torch

from kernels import paged_attention, write_kv
from kernels._library import LOADED, why_not_amx
from kernels.paged_attention import paged_attention_reference, paged_plan

needs_cpp = pytest.mark.skipif(not LOADED, reason="the C++ kernels are not built")


def fresh_seed() -> int:
    return int(np.random.SeedSequence().entropy % 2**32)


class Batch:
    """Sequences with random keys and values in a cache of shuffled blocks; what no sequence owns is NaN."""

    def __init__(self, contexts, queries, q_heads, kv_heads, dim, block_size, seed, spare=3):
        rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        needed = [-(-c // block_size) for c in contexts]
        order = rng.permutation(sum(needed) + spare)
        columns = max([1, *needed])
        self.tables = torch.full((len(contexts), columns), -7, dtype=torch.int32)  # unused entries must not be read
        shape = (len(order), kv_heads, block_size, dim)
        self.k_cache, self.v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        used = 0
        for s, (context, count) in enumerate(zip(contexts, needed, strict=True)):
            self.tables[s, :count] = torch.from_numpy(order[used : used + count].astype(np.int32))
            used += count
            position = torch.arange(context)
            slots = self.tables[s, position // block_size].long() * block_size + position % block_size
            k, v = (torch.randn(context, kv_heads, dim, generator=generator) for _ in range(2))
            write_kv(k, v, self.k_cache, self.v_cache, slots)
        self.starts = torch.tensor([0, *np.cumsum(queries)], dtype=torch.int32)
        self.contexts = torch.tensor(contexts, dtype=torch.int32)
        self.q = torch.randn(sum(queries), q_heads, dim, generator=generator)
        self.scale = dim**-0.5

    def arguments(self):
        return self.q, self.k_cache, self.v_cache, self.tables, self.starts, self.contexts, self.scale

    def run(self):
        return paged_attention(*self.arguments())

    def part(self, sequence: int, queries: int | None = None, context: int | None = None):
        """One sequence alone: its `queries` last queries before `context`."""
        begin, end = (int(x) for x in self.starts[sequence : sequence + 2])
        whole = int(self.contexts[sequence])
        context = whole if context is None else context
        queries = end - begin if queries is None else queries
        stop = end - (whole - context)
        return paged_attention(
            self.q[stop - queries : stop],
            self.k_cache,
            self.v_cache,
            self.tables[sequence : sequence + 1],
            torch.tensor([0, queries], dtype=torch.int32),
            torch.tensor([context], dtype=torch.int32),
            self.scale,
        )


def random_batch(rng: np.random.Generator, seed: int, *shape: int) -> Batch:
    contexts = [int(n) for n in rng.choice([1, 2, 7, 8, 9, 31, 33, 100, 255, 256, 257, 300, 513, 600], size=6)]
    queries = [int(rng.choice([1, min(c, 5), rng.integers(1, c + 1), c])) for c in contexts]
    return Batch(contexts, queries, *shape, seed)


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "dim", "block_size"),
    [(4, 2, 32, 16), (2, 2, 64, 8), (8, 1, 24, 16), (7, 1, 128, 32), (6, 2, 8, 64), (1, 1, 256, 256), (5, 1, 40, 24)],
)
def test_prefill_extend_and_decode_match_float64(q_heads, kv_heads, dim, block_size):
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    for _ in range(2):
        batch = random_batch(rng, seed, q_heads, kv_heads, dim, block_size)
        found = batch.run()
        q, k_cache, v_cache, *rest = batch.arguments()
        truth = paged_attention_reference(q.double(), k_cache.double(), v_cache.double(), *rest)
        note = f"seed {seed}, contexts {batch.contexts.tolist()}, starts {batch.starts.tolist()}"
        assert found.dtype == torch.float32 and torch.isfinite(found).all(), note
        assert (found - truth).abs().max() < 3e-6 * (1 + truth.abs().max()), note


def test_reference_is_plain_causal_attention():
    seed = fresh_seed()
    batch = Batch([50], [50], 4, 2, 32, 16, seed)
    position = torch.arange(50)
    slots = batch.tables[0, position // 16].long(), position % 16
    k, v = (cache[slots[0], :, slots[1]].transpose(0, 1) for cache in (batch.k_cache, batch.v_cache))
    expected = torch.nn.functional.scaled_dot_product_attention(
        batch.q.transpose(0, 1), k, v, is_causal=True, enable_gqa=True
    ).transpose(0, 1)
    torch.testing.assert_close(paged_attention_reference(*batch.arguments()), expected, rtol=1e-5, atol=1e-5)


@needs_cpp
def test_a_row_is_bitwise_the_same_in_any_batch():
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    for shape in ((4, 2, 32, 16), (3, 1, 64, 8), (8, 8, 16, 16), (7, 1, 24, 32)):
        batch = random_batch(rng, seed, *shape)
        together = batch.run()
        for s in range(len(batch.contexts)):
            rows = slice(int(batch.starts[s]), int(batch.starts[s + 1]))
            assert torch.equal(together[rows], batch.part(s)), f"seed {seed}, shape {shape}, sequence {s}"


@needs_cpp
def test_a_prefill_cut_anywhere_and_a_decode_give_the_same_bits():
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    for heads in ((4, 2), (2, 2), (6, 1)):
        batch = Batch([600], [600], *heads, 32, 16, seed)
        whole = batch.run()
        for stop in (int(n) for n in rng.integers(1, 601, size=4)):
            for count in {1, min(stop, 2), int(rng.integers(1, stop + 1))}:
                part = batch.part(0, queries=count, context=stop)
                assert torch.equal(whole[stop - count : stop], part), f"seed {seed}, {heads}, {stop - count}:{stop}"


@needs_cpp
@pytest.mark.parametrize(("block_size", "prefix_blocks"), [(8, 3), (16, 1), (16, 17), (16, 33), (64, 2), (256, 1)])
def test_sequences_that_share_blocks_get_the_bits_of_their_own_copies(block_size, prefix_blocks):
    """Forks of forks: shared full blocks, private tails. Not the block ids count, only what the blocks hold."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 30))
    tails = [int(n) for n in rng.integers(1, 80, size=count)]
    queries = [int(rng.integers(1, tail + 1)) if rng.random() < 0.3 else 1 for tail in tails]
    contexts = [prefix_blocks * block_size + tail for tail in tails]
    batch = Batch(contexts, queries, 4, 2, 32, block_size, seed)
    sources = [int(rng.integers(0, s)) for s in range(1, count)]
    kept = [int(rng.integers(0, prefix_blocks + 1)) for _ in sources]
    for s, (source, blocks) in enumerate(zip(sources, kept, strict=True), start=1):
        own, shared = batch.tables[s, :blocks].long(), batch.tables[source, :blocks].long()
        batch.k_cache[own], batch.v_cache[own] = batch.k_cache[shared], batch.v_cache[shared]
    copies = batch.run()
    for s, (source, blocks) in enumerate(zip(sources, kept, strict=True), start=1):
        batch.tables[s, :blocks] = batch.tables[source, :blocks]
    assert torch.equal(copies, batch.run()), f"seed {seed}, contexts {contexts}, queries {queries}, kept {kept}"


@needs_cpp
def test_a_fork_that_has_not_written_yet_reads_the_tail_of_its_parent():
    """All blocks are shared, of contexts that end in different places of the last ones, in any order."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    for block_size in (8, 32, 256):
        parent = Batch([300], [1], 4, 2, 32, block_size, seed)
        contexts = [int(n) for n in rng.permutation([300, 299, 257, 256, 255, 120, 33, 32, 31, 1])]
        parent.q = torch.randn(len(contexts), 4, 32)
        parent.contexts = torch.tensor(contexts, dtype=torch.int32)
        parent.starts = torch.arange(len(contexts) + 1, dtype=torch.int32)
        parent.tables = parent.tables.repeat(len(contexts), 1)
        together = parent.run()
        for s in range(len(contexts)):
            assert torch.equal(together[s : s + 1], parent.part(s)), f"seed {seed}, contexts {contexts}, sequence {s}"


@needs_cpp
def test_bitwise_equal_for_any_number_of_threads():
    seed = fresh_seed()
    batch = random_batch(np.random.default_rng(seed), seed, 4, 2, 32, 16)
    batch.tables[1:, 0] = batch.tables[0, 0]  # what is worked on together depends on the number of threads
    batch.k_cache.nan_to_num_()
    batch.v_cache.nan_to_num_()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(batch.run())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:]), f"seed {seed}"


def test_sequences_without_queries_and_empty_batches():
    seed = fresh_seed()
    batch = Batch([20, 9, 30], [3, 0, 1], 4, 2, 32, 16, seed)
    truth = paged_attention_reference(*batch.arguments())
    torch.testing.assert_close(batch.run(), truth, rtol=1e-5, atol=1e-5)
    batch = Batch([5], [0], 4, 2, 32, 16, seed)
    assert batch.run().shape == (0, 4, 32)
    empty = torch.zeros(0, dtype=torch.int32)
    out = paged_attention(
        batch.q, batch.k_cache, batch.v_cache, torch.zeros(0, 1, dtype=torch.int32), empty.new_zeros(1), empty, 1.0
    )
    assert out.shape == (0, 4, 32)


def test_large_scores_do_not_overflow():
    seed = fresh_seed()
    batch = Batch([300, 40], [300, 1], 4, 2, 32, 16, seed)
    batch.scale = 40.0
    q, k_cache, v_cache, *rest = batch.arguments()
    truth = paged_attention_reference(q.double(), k_cache.double(), v_cache.double(), *rest)
    found = batch.run()
    assert torch.isfinite(found).all()
    assert (found - truth).abs().max() < 2e-3, f"seed {seed}"


@needs_cpp
@pytest.mark.skipif(
    why_not_amx() in (None, "AXPO_AMX=emulate"), reason="matrix tiles add in their own order: test_matrix_unit.py"
)
def test_bfloat16_is_the_rounded_fp32_result_of_the_same_values():
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    for shape in ((4, 2, 32, 16), (7, 1, 24, 8), (32, 1, 128, 16)):
        batch = random_batch(rng, seed, *shape)
        batch.tables[1:, 0] = batch.tables[0, 0]
        floats = batch.q, batch.k_cache.nan_to_num(), batch.v_cache.nan_to_num()
        narrow = [x.bfloat16() for x in floats]
        rest = batch.tables, batch.starts, batch.contexts, batch.scale
        out = paged_attention(*narrow, *rest, backend="cpp")
        expected = paged_attention(*(x.float() for x in narrow), *rest, backend="cpp")
        assert torch.equal(out, expected.bfloat16()), f"seed {seed}, shape {shape}"


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharing_can_be_switched_off_and_changes_no_bit(dtype):
    seed = fresh_seed()
    batch = Batch([600] * 9, [1] * 9, 4, 2, 64, 16, seed)
    batch.tables[1:, :33] = batch.tables[0, :33]
    floats = [x.nan_to_num().to(dtype) for x in (batch.q, batch.k_cache, batch.v_cache)]
    lengths = batch.tables, batch.starts, batch.contexts
    shared, alone = (
        paged_attention(*floats, *lengths, batch.scale, plan=paged_plan(*lengths, 4, floats[1], share=share))
        for share in (True, False)
    )
    assert torch.equal(shared, alone), f"seed {seed}"


def test_mixed_dtypes_take_the_reference():
    batch = Batch([40, 7], [4, 1], 4, 2, 32, 16, fresh_seed())
    q, k_cache, v_cache, *rest = batch.arguments()
    out = paged_attention(q, k_cache.bfloat16(), v_cache.bfloat16(), *rest)
    torch.testing.assert_close(out, batch.run(), rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="cannot serve this call"):
        paged_attention(q, k_cache.bfloat16(), v_cache.bfloat16(), *rest, backend="cpp")


@needs_cpp
def test_opcheck():
    batch = Batch([20, 7], [2, 1], 4, 2, 32, 16, fresh_seed())
    torch.library.opcheck(torch.ops.axpo.paged_attention.default, batch.arguments())


@needs_cpp
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("contexts", [17, 2, 3], "context_lens\\[0\\] = 17 needs 2 blocks, but block_tables has 1 columns"),
        ("contexts", [3, 0, 3], "context_lens\\[1\\] = 0 is shorter"),
        ("tables", [[0], [99], [2]], "block_tables\\[1, 0\\] = 99 is outside the cache"),
        ("tables", [[0], [-1], [2]], "block_tables\\[1, 0\\] = -1 is outside the cache"),
        ("starts", [0, 1, 2, 4], "cu_seqlens_q runs from 0 to 4, but q has 3 rows"),
        ("starts", [0, 2, 1, 3], "cu_seqlens_q decreases at 1"),
    ],
)
def test_mistakes_are_named(field, value, message):
    batch = Batch([3, 2, 3], [1, 1, 1], 4, 2, 32, 16, 0)
    setattr(batch, field, torch.tensor(value, dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        batch.run()


def test_wrong_shapes_and_dtypes_are_named():
    q, k_cache, v_cache, tables, starts, contexts, scale = Batch([3], [1], 4, 2, 32, 16, 0).arguments()
    with pytest.raises(ValueError, match="with the same D"):
        paged_attention(q[..., :16], k_cache, v_cache, tables, starts, contexts, scale)
    with pytest.raises(ValueError, match="not a multiple of 2 KV heads"):
        paged_attention(q[:, :3], k_cache, v_cache, tables, starts, contexts, scale)
    with pytest.raises(ValueError, match="cu_seqlens_q \\(1,\\)"):
        paged_attention(q, k_cache, v_cache, tables, starts[:1], contexts, scale)
    with pytest.raises(ValueError, match=r"context_lens is torch\.int64"):
        paged_attention(q, k_cache, v_cache, tables, starts, contexts.long(), scale)

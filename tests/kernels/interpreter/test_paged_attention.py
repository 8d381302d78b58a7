"""Triton's paged attention in the interpreter: against float64, and the same bits however a tree is cut into work."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from kernels.paged_attention import (
    PagedTile,
    fixed_paged_plan,
    paged_attention,
    paged_attention_reference,
    paged_plan,
)
from kernels.paged_attention.triton import paged_attention_triton

TILE = PagedTile(16, 32, 3)  # small, so that short contexts have several splits


class Tree:
    """A forest of forks in a cache of shuffled blocks. Cells that no sequence owns, and unused table entries, are
    NaN and far outside."""

    def __init__(self, generator, forks, q_heads=4, kv_heads=2, dim=32, block_size=16, dtype=torch.float32):
        """forks: (parent or −1, tokens kept of it, context, queries) a sequence."""
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        total = sum(-(-context // block_size) for _, _, context, _ in forks)
        free = list(rng.permutation(total + 3))
        shape = (total + 3, kv_heads, block_size, dim)
        self.k, self.v = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        self.tables = torch.full((len(forks), max(-(-c // block_size) for _, _, c, _ in forks)), 1 << 30).int()
        for s, (parent, kept, context, _) in enumerate(forks):
            shared = kept // block_size
            if shared:
                self.tables[s, :shared] = self.tables[parent, :shared]
            for b in range(shared, -(-context // block_size)):
                self.tables[s, b] = block = int(free.pop())
                used = min(block_size, context - b * block_size)
                for cache in (self.k, self.v):
                    cache[block, :, :used] = torch.randn(kv_heads, used, dim, generator=generator)
        queries = [n for *_, n in forks]
        self.starts = torch.tensor([0, *np.cumsum(queries)]).int()
        self.contexts = torch.tensor([context for _, _, context, _ in forks]).int()
        self.q = torch.randn(sum(queries), q_heads, dim, generator=generator).to(dtype)
        self.k, self.v, self.scale = self.k.to(dtype), self.v.to(dtype), dim**-0.5

    def plan(self, share=True, tile=TILE, **options):
        return paged_plan(
            self.tables,
            self.starts,
            self.contexts,
            self.q.shape[1],
            self.k,
            share,
            tile=tile,
            backend="triton",
            **options,
        )

    def run(self, plan=None, **options):
        plan = plan or self.plan(**options)
        arguments = self.q, self.k, self.v, self.tables, self.starts, self.contexts, self.scale
        return paged_attention(*arguments, plan=plan, backend="triton")

    def alone(self, sequence, share=True):
        """The sequence as a batch of its own."""
        begin, end = self.starts[sequence : sequence + 2].tolist()
        tables, contexts = self.tables[sequence : sequence + 1], self.contexts[sequence : sequence + 1]
        starts = torch.tensor([0, end - begin]).int()
        options = {"tile": TILE, "backend": "triton", "share": share}
        plan = paged_plan(tables, starts, contexts, self.q.shape[1], self.k, **options)
        rest = starts, contexts, self.scale
        return paged_attention(self.q[begin:end], self.k, self.v, tables, *rest, plan=plan, backend="triton")

    def truth(self):
        q, k, v = self.q.double(), self.k.double(), self.v.double()
        return paged_attention_reference(q, k, v, self.tables, self.starts, self.contexts, self.scale)


# Groups, levels, a fork inside a block, an unshared decode, an extend and a prefill.
FORKS = [
    (-1, 0, 100, 1),
    (0, 96, 99, 1),
    (1, 64, 70, 2),
    (0, 40, 65, 1),
    (-1, 0, 33, 1),
    (4, 32, 90, 1),
    (-1, 0, 50, 20),
]


@pytest.mark.parametrize(("q_heads", "kv_heads", "dim", "block_size"), [(4, 2, 32, 16), (7, 1, 24, 8), (3, 1, 128, 32)])
def test_matches_float64(q_heads, kv_heads, dim, block_size, generator, poisoned):
    tree = Tree(generator, FORKS, q_heads, kv_heads, dim, block_size)
    found, truth = tree.run(), tree.truth()
    assert torch.isfinite(found).all()
    assert (found - truth).abs().max() < 3e-6 * (1 + truth.abs().max())


def test_sharing_changes_no_bit(generator):
    """Shared, not shared, any cut into items, and each sequence alone."""
    tree = Tree(generator, FORKS)
    shared = tree.run()
    assert tree.plan().num_items != tree.plan(share=False).num_items
    for tile in (PagedTile(16, 32, 1), PagedTile(16, 32, 10_000)):  # all direct; all split up
        assert torch.equal(shared, tree.run(share=False, tile=tile))
    for s in range(len(FORKS)):
        assert torch.equal(shared[tree.starts[s] : tree.starts[s + 1]], tree.alone(s))


def test_a_prefill_cut_anywhere_gives_the_same_bits(generator):
    tree = Tree(generator, [(-1, 0, 80, 80)], dim=16)
    whole = tree.run()
    cut = int(torch.randint(1, 80, (1,), generator=generator))
    for first, stop in ((0, cut), (cut, 80), (cut - 1, cut)):
        part = Tree(generator, [(-1, 0, 80, 80)], dim=16)
        part.q, part.k, part.v, part.tables = tree.q[first:stop], tree.k, tree.v, tree.tables
        part.starts, part.contexts = torch.tensor([0, stop - first]).int(), torch.tensor([stop]).int()
        assert torch.equal(part.run(), whole[first:stop])


def test_bfloat16(generator, poisoned):
    tree = Tree(generator, FORKS[:5], dtype=torch.bfloat16)
    found, truth = tree.run(), tree.truth()
    assert found.dtype == torch.bfloat16
    assert (found.double() - truth).abs().max() < 2e-2 * truth.abs().max()
    assert torch.equal(found, tree.run(share=False))


@pytest.mark.parametrize("case", ["peaked", "offset", "equal"])
def test_hard_scores(case, generator):
    tree = Tree(generator, FORKS[:3])
    if case == "peaked":
        tree.scale = 30.0
    elif case == "offset":  # every score of a row is near ±1000
        tree.k[..., 0], tree.q[..., 0] = 100.0, torch.where(tree.q[..., 0] > 0, 10.0, -10.0)
        tree.scale = 1.0
    else:
        tree.q.zero_()
    found, truth = tree.run(), tree.truth()
    # fp32 scores near 1000 are apart by 6e-5.
    assert (found - truth).abs().max() < (3e-6 if case == "equal" else 2e-3) * (1 + truth.abs().max())


def test_strided_queries_and_caches_that_are_layers_of_one_tensor(generator):
    tree = Tree(generator, FORKS[:4])
    expected = tree.run()
    kv = torch.stack([torch.stack([tree.k, tree.v])] * 2)
    fused = torch.cat([tree.q, torch.randn(len(tree.q), 3, 32, generator=generator)], dim=1)[:, :4]
    assert not fused.is_contiguous()
    tree.q, tree.k, tree.v = fused, kv[1, 0], kv[1, 1]
    assert torch.equal(tree.run(), expected)
    plan = tree.plan()
    tree.k = tree.k.transpose(2, 3).contiguous().transpose(2, 3)  # a cache is not copied behind the caller's back
    with pytest.raises(ValueError, match="cannot serve"):
        tree.run(plan)


def test_a_fixed_plan_serves_a_changing_tree(generator):
    """As a captured CUDA graph: the call's arguments stay, the plan's contents change."""
    fixed = fixed_paged_plan(8, 128, torch.device("cpu"), tile=TILE)
    for forks in ([(-1, 0, 100, 1), (0, 96, 99, 1), (0, 64, 70, 2)], [(-1, 0, 20, 1), (-1, 0, 128, 1)]):
        tree = Tree(generator, forks)
        assert tree.plan(into=fixed) is fixed
        assert torch.equal(paged_attention_triton(tree.q, tree.k, tree.v, tree.tables, fixed, tree.scale), tree.run())


def test_no_queries_and_no_sequences(generator):
    tree = Tree(generator, [(-1, 0, 20, 0), (-1, 0, 33, 1), (-1, 0, 5, 0)])
    assert (tree.run() - tree.truth()).abs().max() < 1e-5
    tree = Tree(generator, [(-1, 0, 20, 0)])
    assert tree.run().shape == (0, 4, 32)


def test_a_cache_of_more_than_2_to_the_31_elements(generator):
    block, heads, size, dim = 16 * 8 * 256, 8, 16, 256
    blocks = 2**31 // block + 3
    cache = torch.empty(blocks, heads, size, dim, dtype=torch.float16)  # pages that are not written take no memory
    cache[-1] = torch.randn(heads, size, dim, generator=generator)
    tables, starts, contexts = torch.tensor([[blocks - 1]]).int(), torch.tensor([0, 1]).int(), torch.tensor([9]).int()
    q = torch.randn(1, heads, dim, generator=generator).half()
    plan = paged_plan(tables, starts, contexts, heads, cache, tile=TILE, backend="triton")
    found = paged_attention(q, cache, cache, tables, starts, contexts, 0.1, plan=plan, backend="triton")
    expected = paged_attention_reference(q, cache[-1:], cache[-1:], torch.zeros_like(tables), starts, contexts, 0.1)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_opcheck(generator):
    tree = Tree(generator, [(-1, 0, 40, 1), (0, 32, 34, 1)], 2, 1, dim=16)
    plan = tree.plan()
    sizes = [plan.max_rows, plan.num_items, plan.num_merged, plan.num_partials, 16, 32, 3]
    arguments = tree.q, tree.k.nan_to_num(), tree.v.nan_to_num(), tree.tables, plan.buffer, sizes, tree.scale
    torch.library.opcheck(torch.ops.axpo.triton_paged_attention.default, arguments)


def test_mistakes_are_named(generator):
    tree = Tree(generator, FORKS[:2])
    tree.contexts[1] = 1000
    with pytest.raises(ValueError, match="sequence 1 of 1000 tokens has 1 queries, and its table has room for 112"):
        tree.plan()
    tree.starts[2] = 0
    with pytest.raises(ValueError, match="not decrease"):
        tree.plan()

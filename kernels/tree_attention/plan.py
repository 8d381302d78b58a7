"""Which blocks of keys a block of queries visits, found on the device: spans of blocks, with and without a mask.

The keys that a block of queries sees are the paths to its tokens, which lie apart in a packed tree. A test of every
block in the loop would be a branch around its loads, which ends their pipelining; a list of single blocks would put a
load in front of every address. Spans keep the inner loop that of plain attention: a causal row has one span without a
mask and one, the diagonal, with it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels._triton import jit

CHUNK = 1024  # key blocks that a program looks at together


class Plan(NamedTuple):
    """Half-open ranges of key blocks, spans [query blocks, 2, capacity, 2] int32, in ascending order.

    counts [query blocks, 2]: how many are valid. Index 0 of both is for blocks without a mask, 1 for those with one.
    """

    spans: torch.Tensor
    counts: torch.Tensor


def make_plan(subtree_end: torch.Tensor, rows: int, keys: int) -> Plan:
    """The plan of blocks of `rows` queries over blocks of `keys` keys. Two launches, 8 T² / (rows · keys) bytes."""
    tokens, device = subtree_end.shape[0], subtree_end.device
    query_blocks, key_blocks = triton.cdiv(tokens, rows), triton.cdiv(tokens, keys)
    bounds = torch.empty(2, key_blocks, dtype=torch.int32, device=device)
    # Two spans of a kind do not touch, so there are at most half as many as blocks.
    capacity = (key_blocks + 1) // 2
    spans = torch.empty(query_blocks, 2, capacity, 2, dtype=torch.int32, device=device)
    counts = torch.empty(query_blocks, 2, dtype=torch.int32, device=device)
    together = max(1, 4096 // keys)
    _bounds[(triton.cdiv(key_blocks, together),)](subtree_end, bounds, tokens, key_blocks, KEYS=keys, BLOCKS=together)
    _spans[(query_blocks, 2)](
        bounds, spans, counts, tokens, key_blocks, capacity, ROWS=rows, KEYS=keys, CHUNK=CHUNK, num_warps=4
    )
    return Plan(spans, counts)


@jit(do_not_specialize=["tokens", "key_blocks"])
def _bounds(subtree_end, bounds, tokens, key_blocks, KEYS: tl.constexpr, BLOCKS: tl.constexpr):
    """bounds [2, key_blocks]: the smallest and the largest subtree_end of every key block."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    key = block[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    end = tl.load(subtree_end + key, mask=key < tokens, other=0).to(tl.int32)
    tl.store(bounds + block, tl.min(end, 1), mask=block < key_blocks)
    tl.store(bounds + key_blocks + block, tl.max(end, 1), mask=block < key_blocks)


@jit
def _is_of_kind(bounds, block, key_blocks, first, last, kind, KEYS: tl.constexpr):
    """Whether the queries first … last see the block, all of it (kind 0) or a part of it (kind 1)."""
    exists = (block >= 0) & (block < key_blocks) & (block * KEYS <= last)
    earliest = tl.load(bounds + block, mask=exists, other=0)
    latest = tl.load(bounds + key_blocks + block, mask=exists, other=0)
    seen = exists & (latest > first)
    full = seen & (block * KEYS + KEYS - 1 <= first) & (earliest > last)
    return tl.where(kind == 0, full, seen & (full == 0))


@jit(do_not_specialize=["tokens", "key_blocks", "capacity"])
def _spans(
    bounds, spans, counts, tokens, key_blocks, capacity,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    kind = tl.program_id(1)
    first = tl.program_id(0) * ROWS
    last = tl.minimum(first + ROWS, tokens) - 1
    item = tl.program_id(0) * 2 + kind
    target = spans + item.to(tl.int64) * capacity * 2
    count = first * 0
    for start in range(0, last // KEYS + 1, CHUNK):
        block = start + tl.arange(0, CHUNK)
        here = _is_of_kind(bounds, block, key_blocks, first, last, kind, KEYS)
        begins = here & (_is_of_kind(bounds, block - 1, key_blocks, first, last, kind, KEYS) == 0)
        ends = here & (_is_of_kind(bounds, block + 1, key_blocks, first, last, kind, KEYS) == 0)
        index = count + tl.cumsum(begins.to(tl.int32), 0) - 1
        tl.store(target + index * 2, block, mask=begins)
        tl.store(target + index * 2 + 1, block + 1, mask=ends)
        count += tl.sum(begins.to(tl.int32), 0)
    tl.store(counts + item, count)

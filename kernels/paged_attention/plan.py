"""What one step's paged attention computes, decided on the host: who reads which keys together, and what is merged.

Keys are reduced in splits at absolute multiples of `PagedTile.split` tokens. A work item is a tile of query rows over
splits whose blocks they have in common:
  * a partial item covers one split and leaves an output and a log-sum-exp a row, which are merged in the order of the
    splits. Sequences whose block tables begin alike share the items of the whole splits they share;
  * a direct item covers all splits of its rows, folds them in the same order with the same arithmetic, and writes the
    result.
So a row gets the same bits whichever it is, and the plan is free to choose by cost alone.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

HEADER = 4  # integers: items, rows to merge, and two of padding
ROW = 3  # columns: token, position, first partial (-1: none, a direct item writes the row's result)
ITEM = 8  # row_begin, row_count, table, first split, end split, end of the keys, direct, padding

_hash = np.random.default_rng(0x5EED).integers(1, 2**63, size=1 << 12, dtype=np.uint64) | np.uint64(1)


class PlanOverflow(ValueError):
    """A step does not fit the fixed sizes of the plan it was to be written into."""


@dataclass(frozen=True, slots=True)
class PagedTile:
    """Sizes that a plan is cut by. `rows` and `split` are part of the result's bits, so they are frozen per GPU.

    rows: of a tile, query tokens × the query heads of a KV head. split: tokens reduced together.
    programs: that run at once on the device; each takes every programs-th item.
    """

    rows: int
    split: int
    programs: int


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """The work of one step, made once and used by every layer.

    buffer: int32 on the device: HEADER, max_rows rows in columns (token | position | first partial), then the items.
    num_items, num_merged, num_partials: what this step uses; None when the plan is fixed, as a captured CUDA graph
    must not depend on them: then the kernels read them from the buffer, which may be rewritten between replays.
    share: whether sequences read common keys together. A backend without work lists needs nothing but this.
    """

    share: bool = True
    buffer: torch.Tensor | None = None
    tile: PagedTile | None = None
    max_rows: int = 0
    max_items: int = 0
    max_partials: int = 0
    num_items: int | None = None
    num_merged: int | None = None
    num_partials: int | None = None


@dataclass(frozen=True, slots=True)
class WorkList:
    """A plan as arrays on the host. rows [R, ROW], items [I, ITEM]; the first `merged` rows have partials."""

    rows: np.ndarray
    items: np.ndarray
    merged: int
    partials: int


def fixed_plan(
    max_tokens: int, max_context: int, tile: PagedTile, device: torch.device, share: bool = True
) -> PagedPlan:
    """An empty plan of fixed size, for any step of at most max_tokens query tokens of contexts up to max_context.

    Its partials take max_tokens * ceil(max_context / split) * Hq * (D + 1) * 4 bytes in every call that uses it.
    """
    partials = max_tokens * -(-max_context // tile.split)
    buffer = torch.zeros(HEADER + ROW * max_tokens + ITEM * partials, dtype=torch.int32, device=device)
    return PagedPlan(share, buffer, tile, max_tokens, partials, partials)


def upload(work: WorkList, tile: PagedTile, device: torch.device, share: bool, into: PagedPlan | None) -> PagedPlan:
    """The work list on the device, in one copy that does not wait; into a fixed plan if one is given.

    Raises PlanOverflow when it does not fit.
    """
    rows, items = len(work.rows), len(work.items)
    if into is None:
        counts = {"num_items": items, "num_merged": work.merged, "num_partials": work.partials}
        plan = PagedPlan(share, None, tile, rows, items, work.partials, **counts)
    else:
        plan = into
        if plan.tile != tile or rows > plan.max_rows or items > plan.max_items or work.partials > plan.max_partials:
            raise PlanOverflow(
                f"paged_attention: {rows} rows, {items} items and {work.partials} partials of {tile} do not fit the "
                f"fixed plan of {plan.max_rows}, {plan.max_items} and {plan.max_partials} of {plan.tile}"
            )
    host = np.zeros(HEADER + ROW * plan.max_rows + ITEM * items, dtype=np.int32)
    host[:2] = items, work.merged
    host[HEADER : HEADER + ROW * plan.max_rows].reshape(ROW, -1)[:, :rows] = work.rows.T
    host[HEADER + ROW * plan.max_rows :] = work.items.ravel()
    packed = torch.from_numpy(host)
    if device.type == "cuda":  # the caching host allocator keeps the pinned copy until the transfer is over
        packed = packed.pin_memory()
    if plan.buffer is None:
        return replace(plan, buffer=packed.to(device, non_blocking=True))
    plan.buffer[: len(packed)].copy_(packed, non_blocking=True)
    return plan


def build(
    block_tables: np.ndarray,
    cu_seqlens_q: np.ndarray,
    context_lens: np.ndarray,
    tile: PagedTile,
    group: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    itemsize: int,
    share: bool = True,
) -> WorkList:
    """The work list of a step. Array arguments as for paged_attention.

    group: query heads of a KV head. itemsize: bytes of a value of the cache. block_size divides tile.split.
    Sequences are split up, instead of being read by a direct item a tile, when
      * they share whole splits, and the bytes that their trie saves exceed the merge of all their rows; or
      * a direct item would be longer than an even share of the step's work among the programs.
    Raises ValueError when blocks do not divide splits.
    """
    if tile.split % block_size:
        raise ValueError(f"paged_plan: blocks of {block_size} tokens do not divide the split of {tile.split}")
    tables, starts = np.asarray(block_tables), np.asarray(cu_seqlens_q, dtype=np.int64)
    tokens, contexts = np.diff(starts), np.asarray(context_lens, dtype=np.int64)
    first = contexts - tokens  # position of a sequence's first query
    splits = -(-contexts // tile.split)
    whole = np.where(tokens > 0, (first + 1) // tile.split, 0)  # splits that every query of the sequence sees whole
    fit = tile.rows // group  # query tokens of a tile

    shared, common = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    if share:
        shared = np.flatnonzero((tokens > 0) & (tokens < fit) & (whole > 0))  # who fills a tile alone gains nothing
        order, common = _sort_by_prefix(tables[shared], whole[shared], tile.split // block_size)
        shared = shared[order]
        split_bytes = tile.split * 2 * head_dim * itemsize
        partial_bytes = group * (head_dim + 1) * 8  # fp32 values and a log-sum-exp, written and read
        kept = _worth_sharing(tokens[shared], splits[shared], common, fit, split_bytes, partial_bytes)
        shared, common = shared[kept], common[kept]

    alone = np.flatnonzero(tokens > 0)
    alone = alone[~np.isin(alone, shared)]
    tile_counts = -(-tokens[alone] // fit)
    tile_last = first[alone].repeat(tile_counts) + np.minimum(
        (_ranges(tile_counts) + 1) * fit, tokens[alone].repeat(tile_counts)
    )
    work = int((-(-tile_last // tile.split)).sum()) + _pairs(splits[shared], common)[2].size
    even = max(1, -(-work * kv_heads // tile.programs))
    long = splits[alone] > even

    # Rows: those that are merged first, sequences that share side by side.
    merged_sequences = np.concatenate([shared, alone[long]])
    common = np.concatenate([common, np.zeros(int(long.sum()), dtype=np.int64)])
    sequences = np.concatenate([merged_sequences, alone[~long]])
    counts = tokens[sequences]
    offset = _ranges(counts)
    position = first[sequences].repeat(counts) + offset
    merged = int(tokens[merged_sequences].sum())
    row_splits = position[:merged] // tile.split + 1
    partial = np.full(len(position), -1, dtype=np.int64)
    partial[:merged] = np.cumsum(row_splits) - row_splits
    rows = np.stack([starts[sequences].repeat(counts) + offset, position, partial], axis=1)
    row_begin = np.cumsum(counts) - counts

    # Partial items: a node of the trie is a run of sequences at one split.
    at_split, member, heads = _pairs(splits[merged_sequences], common)
    node_tokens = np.add.reduceat(counts[member], heads) if len(heads) else np.empty(0, dtype=np.int64)
    leader, split = member[heads], at_split[heads]
    parts = _tiles_of(row_begin[leader], node_tokens, fit)
    partial_items = _items(parts, merged_sequences[leader], split, split + 1, position, tile.split, direct=False)
    # Direct items: a tile of one sequence over all that it sees.
    rest = slice(len(merged_sequences), None)
    parts = _tiles_of(row_begin[rest], counts[rest], fit)
    zero = np.zeros(len(sequences) - len(merged_sequences), dtype=np.int64)
    direct_items = _items(parts, sequences[rest], zero, splits[sequences[rest]], position, tile.split, direct=True)

    items = np.concatenate([partial_items, direct_items])
    length = items[:, 5] - items[:, 3] * tile.split
    items = items[length > 0]  # a tile of a long chunk may end before the split begins
    items = items[np.argsort(-length[length > 0], kind="stable")]  # heavy ones first, for balance
    return WorkList(rows.astype(np.int32), items.astype(np.int32), merged, int(row_splits.sum()))


def _sort_by_prefix(tables: np.ndarray, whole: np.ndarray, blocks_per_split: int) -> tuple[np.ndarray, np.ndarray]:
    """An order in which equal prefixes are neighbours, and how many whole splits each shares with the one before.

    The order comes from hashes of the splits' blocks, what is shared from the blocks themselves: a collision can only
    lose sharing.
    """
    if len(tables) < 2:
        return np.arange(len(tables)), np.zeros(len(tables), dtype=np.int64)
    levels = int(whole.max())
    tables = tables[:, : levels * blocks_per_split]
    cut = tables.reshape(len(tables), levels, blocks_per_split).astype(np.uint64)
    factors = np.resize(_hash, blocks_per_split)
    key = (cut * factors).sum(axis=2)
    key ^= key >> np.uint64(32)
    key[np.arange(levels) >= whole[:, None]] = 0
    order = np.lexsort(key.T[::-1])
    tables, whole = tables[order], whole[order]
    differ = tables[1:] != tables[:-1]
    equal = np.where(differ.any(axis=1), differ.argmax(axis=1), tables.shape[1]) // blocks_per_split
    common = np.zeros(len(tables), dtype=np.int64)
    common[1:] = np.minimum(equal, np.minimum(whole[1:], whole[:-1]))
    return order, common


def _worth_sharing(
    tokens: np.ndarray,
    splits: np.ndarray,
    common: np.ndarray,
    fit: int,
    split_bytes: int,
    partial_bytes: int,
) -> np.ndarray:
    """Which sequences are in a tree that saves more bytes of keys and values than its merge moves, per KV head.

    Once a tree's rows are merged at all, every level of it is free, so the choice is one a tree.
    """
    if not len(tokens):
        return np.zeros(0, dtype=bool)
    tree = np.cumsum(common == 0) - 1
    _, member, heads = _pairs(splits, common)
    members = np.diff(np.append(heads, len(member)))
    node_tokens = np.add.reduceat(tokens[member], heads)
    saved = np.bincount(tree[member[heads]], (members - -(-node_tokens // fit)) * split_bytes)
    merge = np.bincount(tree, tokens * splits * partial_bytes)
    return (saved > merge)[tree]


def _pairs(splits: np.ndarray, common: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(split, sequence) of everything that sequences see, by split; and where a new node of the trie begins."""
    if not len(splits):
        none = np.empty(0, dtype=np.int64)
        return none, none, none
    at_split, member = np.nonzero(np.arange(splits.max())[:, None] < splits)
    return at_split, member, np.flatnonzero(common[member] <= at_split)


def _ranges(counts: np.ndarray) -> np.ndarray:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, …"""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - (ends - counts).repeat(counts)


def _tiles_of(begin: np.ndarray, count: np.ndarray, fit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of rows cut into tiles: which run, first row and rows of each."""
    tiles = -(-count // fit)
    run, at = np.arange(len(count)).repeat(tiles), _ranges(tiles) * fit
    return run, begin[run] + at, np.minimum(fit, count[run] - at)


def _items(
    parts: tuple[np.ndarray, np.ndarray, np.ndarray],
    table: np.ndarray,
    first: np.ndarray,
    end: np.ndarray,
    position: np.ndarray,
    split: int,
    direct: bool,
) -> np.ndarray:
    run, row, count = parts
    items = np.zeros((len(run), ITEM), dtype=np.int64)
    if not len(run):
        return items
    key_end = np.minimum(end[run] * split, position[row + count - 1] + 1)  # the last row of a tile sees the most
    end = -(-key_end // split) if direct else end[run]
    for column, values in enumerate((row, count, table[run], first[run], end, key_end, np.full(len(run), direct))):
        items[:, column] = values
    return items

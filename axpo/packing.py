"""Whole trees into micro-batches under a token budget, of equal work on all ranks; trees may move between ranks."""

from collections.abc import Callable, Sequence

from axpo.distributed import exchange_objects, gather_objects, rank, world_size
from axpo.tree import PackedBatch, concatenate

Row = list[int]
"""Trees of one micro-batch, by their number among the trees of all ranks."""


def pack_trees(
    trees: Sequence[PackedBatch], budget: int, cost: Callable[[PackedBatch], float] | None = None
) -> list[PackedBatch]:
    """This rank's micro-batches of at most `budget` tokens, from the trees of all ranks; every rank calls it.

    FSDP keeps ranks in step, so that micro-batch i of all ranks lasts as long as the largest of them: it is these that
    are balanced, by `cost` (default: tokens). Only sizes and costs are known to all; a tree then goes, images included,
    to the rank that computes it. Deterministic. A tree above the budget has a micro-batch to itself. A rank has at most
    one micro-batch less than another.
    """
    shares = gather_objects([[(tree.num_tokens, cost(tree) if cost else float(tree.num_tokens)) for tree in trees]])
    owners = [owner for owner, share in enumerate(shares) for _ in share]
    sizes, costs = [size for share in shares for size, _ in share], [cost for share in shares for _, cost in share]
    rounds = plan_rounds(sizes, costs, owners, budget, world_size())

    offset = owners.index(rank()) if trees else 0
    parcels: list[dict[int, PackedBatch]] = [{} for _ in range(world_size())]
    for row_of in rounds:
        for target, row in enumerate(row_of):
            parcels[target] |= {tree: trees[tree - offset] for tree in row if owners[tree] == rank()}
    held = {number: tree for parcel in exchange_objects(parcels) for number, tree in parcel.items()}
    return [concatenate([held[tree] for tree in row]) for row_of in rounds if (row := row_of[rank()])]


def plan_rounds(
    sizes: Sequence[int], costs: Sequence[float], owners: Sequence[int], budget: int, ranks: int
) -> list[list[Row]]:
    """[round][rank] -> the trees of that micro-batch; only in the last round may some be empty.

    Args:
        sizes, costs, owners: of every tree its tokens, its work, and the rank that has it.
    """
    rows = first_fit(sizes, budget)
    rounds = [rows[start : start + ranks] for start in range(0, len(rows), ranks)]
    return [_to_ranks(_level(some, sizes, costs, budget, ranks), costs, owners) for some in rounds]


def first_fit(sizes: Sequence[int], budget: int) -> list[Row]:
    """Rows of at most `budget` tokens: largest first, each into the first row with room, ties by order."""
    rows: list[Row] = []
    room: list[int] = []
    for tree in sorted(range(len(sizes)), key=lambda tree: -sizes[tree]):
        row = next((i for i, left in enumerate(room) if sizes[tree] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(budget)
        rows[row].append(tree)
        room[row] -= sizes[tree]
    return rows


def _level(rows: list[Row], sizes: Sequence[int], costs: Sequence[float], budget: int, ranks: int) -> list[Row]:
    """The round's trees in `ranks` rows of more equal cost, if that fits: dearest first, each into the cheapest row."""
    padded = rows + [[] for _ in range(ranks - len(rows))]
    order = {tree: place for place, tree in enumerate(tree for row in rows for tree in row)}
    levelled: list[Row] = [[] for _ in range(ranks)]
    tokens, work = [0] * ranks, [0.0] * ranks
    for tree in sorted(order, key=lambda tree: -costs[tree]):
        fitting = [i for i in range(ranks) if not levelled[i] or tokens[i] + sizes[tree] <= budget]
        if not fitting:
            return padded
        row = min(fitting, key=lambda i: work[i])
        levelled[row].append(tree)
        tokens[row] += sizes[tree]
        work[row] += costs[tree]
    if max(work) >= max(sum(costs[tree] for tree in row) for row in rows):
        return padded
    return [sorted(row, key=order.__getitem__) for row in levelled]


def _to_ranks(rows: list[Row], costs: Sequence[float], owners: Sequence[int]) -> list[Row]:
    """The rows in the order of ranks: each goes where most of its work lies already, the largest such share first."""
    held: dict[tuple[int, int], float] = {}
    for number, row in enumerate(rows):
        for tree in row:
            pair = number, owners[tree]
            held[pair] = held.get(pair, 0.0) + costs[tree]
    placed: dict[int, int] = {}  # rank -> row
    left = dict.fromkeys(range(len(rows)))
    for number, owner in sorted(held, key=lambda pair: -held[pair]):
        if owner not in placed and number in left:
            placed[owner] = number
            del left[number]
    rest = iter(left)
    return [rows[placed[target] if target in placed else next(rest)] for target in range(len(rows))]

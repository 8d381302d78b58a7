"""The decoding requests of a step as arrays, one row each, so that a step's host work is a few array operations."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from engine.scheduler import Request

COLUMNS = ("token", "position", "delta", "seed", "top_k", "limit")
FLOATS = ("temperature", "top_p", "min_p")


class DecodeBatch:
    """Requests whose next step computes exactly one token, in the order of their sequences' paths: siblings adjoin.

    Row r of every array belongs to `requests[r]`:
        token        [n] int64    the token to compute: the last one of the sequence
        position     [n] int64    its index, which is also the number of tokens that have KV
        delta        [n] int64    rotary position - index
        seed, top_k  [n] int64    and temperature, top_p, min_p [n] fp32: of the sampler
        table        [n, columns] int32, the block table; what lies behind a row's last block is not defined
        limit        [n] int64    tokens at which the run ends
        num_blocks   [n] int64    blocks in the row's table
        shared       [n] bool     the block that the next token goes to may be shared
    """

    def __init__(self, capacity: int, block_size: int):
        self.block_size = block_size
        self.requests: list[Request] = []
        self._ints = np.zeros((len(COLUMNS), capacity), dtype=np.int64)
        self._floats = np.zeros((len(FLOATS), capacity), dtype=np.float32)
        self._table = np.zeros((capacity, 16), dtype=np.int32)
        self._num_blocks = np.zeros(capacity, dtype=np.int64)
        self._shared = np.zeros(capacity, dtype=bool)
        self._shaped = np.zeros(capacity, dtype=bool)

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def token(self) -> npt.NDArray[np.int64]:
        return self._ints[0, : len(self)]

    @property
    def position(self) -> npt.NDArray[np.int64]:
        return self._ints[1, : len(self)]

    @property
    def delta(self) -> npt.NDArray[np.int64]:
        return self._ints[2, : len(self)]

    @property
    def seed(self) -> npt.NDArray[np.int64]:
        return self._ints[3, : len(self)]

    @property
    def top_k(self) -> npt.NDArray[np.int64]:
        return self._ints[4, : len(self)]

    @property
    def limit(self) -> npt.NDArray[np.int64]:
        return self._ints[5, : len(self)]

    @property
    def temperature(self) -> npt.NDArray[np.float32]:
        return self._floats[0, : len(self)]

    @property
    def top_p(self) -> npt.NDArray[np.float32]:
        return self._floats[1, : len(self)]

    @property
    def min_p(self) -> npt.NDArray[np.float32]:
        return self._floats[2, : len(self)]

    @property
    def shaped(self) -> list[int]:
        """Rows whose requests shape their logits."""
        return np.flatnonzero(self._shaped[: len(self)]).tolist()

    def tables(self) -> npt.NDArray[np.int32]:
        """[n, columns], as wide as the longest table."""
        width = int(self._num_blocks[: len(self)].max(initial=1))
        return np.ascontiguousarray(self._table[: len(self), :width])

    def slots(self) -> npt.NDArray[np.int64]:
        """[n] int64: where each row's token goes in the cache, block * block_size + offset."""
        block, offset = np.divmod(self.position, self.block_size)
        return self._table[np.arange(len(self)), block].astype(np.int64) * self.block_size + offset

    def rows_to_reserve(self) -> list[int]:
        """Rows whose next token has no block yet, or perhaps a shared one."""
        n = len(self)
        return np.flatnonzero(self._shared[:n] | (self.position >= self._num_blocks[:n] * self.block_size)).tolist()

    def reserved(self, row: int) -> None:
        """To be called when the sequence's block table has a block of its own for the row's next token."""
        self._write_table(row, self.requests[row].sequence.block_table)
        self._shared[row] = False

    def mark_shared(self, request: "Request") -> None:
        self._shared[self.requests.index(request)] = True

    def add(self, requests: Iterable["Request"]) -> None:
        """Requests with one pending token join; rows are sorted again."""
        first = len(self)
        self.requests += requests
        self._grow(len(self))
        for row in range(first, len(self)):
            request = self.requests[row]
            sequence, params = request.sequence, request.params
            length = len(sequence.token_ids)
            delta = sequence.spans[-1].delta if sequence.spans else 0
            self._ints[:, row] = (sequence.token_ids[-1], length - 1, delta, request.seed, params.top_k, request.limit)
            self._floats[:, row] = (params.temperature, params.top_p, params.min_p)
            self._shared[row] = True
            self._shaped[row] = request.shaper is not None
            self._write_table(row, sequence.block_table)
        order = sorted(range(len(self)), key=lambda row: self.requests[row].sequence.path)
        if order != list(range(len(self))):
            self._take(order)

    def remove(self, requests: set["Request"]) -> None:
        """The requests leave, those that are here; the order of the others stays."""
        keep = [row for row, request in enumerate(self.requests) if request not in requests]
        if len(keep) < len(self):
            self._take(keep)

    def advance(self, tokens: npt.NDArray[np.int64]) -> None:
        """Every row's token is computed, and the next one is `tokens` [n]."""
        self.token[:] = tokens
        self.position[:] += 1

    def _take(self, rows: list[int]) -> None:
        n = len(rows)
        self.requests = [self.requests[row] for row in rows]
        self._ints[:, :n] = self._ints[:, rows]
        self._floats[:, :n] = self._floats[:, rows]
        self._table[:n] = self._table[rows]
        self._num_blocks[:n] = self._num_blocks[rows]
        self._shared[:n] = self._shared[rows]
        self._shaped[:n] = self._shaped[rows]

    def _write_table(self, row: int, table: list[int]) -> None:
        if len(table) > self._table.shape[1]:
            self._table = np.pad(self._table, ((0, 0), (0, max(len(table), self._table.shape[1]))))
        self._table[row, : len(table)] = table
        self._num_blocks[row] = len(table)

    def _grow(self, rows: int) -> None:
        more = rows - len(self._num_blocks)
        if more > 0:
            more = max(more, len(self._num_blocks))
            self._ints = np.pad(self._ints, ((0, 0), (0, more)))
            self._floats = np.pad(self._floats, ((0, 0), (0, more)))
            self._table = np.pad(self._table, ((0, more), (0, 0)))
            self._num_blocks = np.pad(self._num_blocks, (0, more))
            self._shared = np.pad(self._shared, (0, more))
            self._shaped = np.pad(self._shaped, (0, more))

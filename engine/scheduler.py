"""Continuous batching: every live sequence has pending tokens, and a step computes some of them."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine.batch import DecodeBatch
from engine.block_pool import BlockCopy, BlockPool, OutOfBlocks
from engine.logits import LogitsShaper
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

WATERMARK = 0.01  # of the blocks: kept free when a request is admitted, so that those that run can grow


@dataclass(eq=False, slots=True)
class Request:
    """One run of a sequence: from `start` tokens on until something stops it or there are `limit` tokens in all.

    `limit == start` asks for no token: the sequence is only prefilled. `shaper` is set where the parameters ask for
    more than the sampler does by itself. `stopped_by`: the stop token or string that ended the run.
    """

    sequence: Sequence
    params: SamplingParams
    seed: int
    start: int
    limit: int
    stop_ids: frozenset[int]
    shaper: LogitsShaper | None = None
    index: int = 0
    arrival: int = -1
    stopped_by: int | str | None = None
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    processed_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Tokens without KV. 0 after a fork from computed KV: then the last token's query runs, nothing is written."""
        return len(self.sequence.token_ids) - self.sequence.num_computed

    @property
    def samples(self) -> bool:
        return self.limit > self.start


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens start … stop-1 of a request's sequence, computed in this step.

    With `writes` False it is the last token alone, whose KV is there: its query is wanted, to sample what follows. An
    empty chunk computes nothing: what follows is sampled from the sequence's `last_hidden`.
    """

    request: Request
    start: int
    stop: int
    writes: bool = True


class Scheduler:
    """All decodes, then prefill in chunks, up to `max_batch_tokens` a step and `max_num_seqs` running.

    A request waits, then computes chunks (`prefilling`), then one token a step (`decoding`). When blocks run out, idle
    sequences lose their KV first, the longest idle before others, then the latest running request goes back to the
    queue; leaves go before sequences with open forks. All is computed again later, so no token is lost. Idle sequences
    are never searched: `idle` and `idle_parents` (those with open forks) hold the longest idle first.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_batch_tokens: int,
        max_num_seqs: int,
        copy_blocks: Callable[[list[BlockCopy]], None],
        prefix_caching: bool = True,
    ):
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_num_seqs = min(max_num_seqs, max_batch_tokens)
        self.prefix_caching = prefix_caching
        self.waiting: deque[Request] = deque()
        self.running: dict[Request, None] = {}  # in the order of admission
        self.prefilling: dict[Request, None] = {}
        self.decoding = DecodeBatch(64, pool.block_size)
        self.idle: dict[int, Sequence] = {}
        self.idle_parents: dict[int, Sequence] = {}
        self.preemptions = 0
        self._arrivals = itertools.count()
        self._watermark = int(pool.num_blocks * WATERMARK)
        self._copy_blocks = copy_blocks
        self._copies: list[BlockCopy] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queues a request. Raises OutOfBlocks when its tokens do not fit the KV cache."""
        if -(-len(request.sequence) // self.pool.block_size) > self.pool.num_blocks:
            raise self._too_long(request)
        self.unpark(request.sequence)
        request.sequence.request = request
        request.arrival = next(self._arrivals)
        self.waiting.append(request)

    def remove(self, requests: set[Request]) -> None:
        """Takes finished or aborted requests out; their sequences keep their KV."""
        for request in requests:
            if request in self.running:
                del self.running[request]
                self.prefilling.pop(request, None)
            else:
                self.waiting.remove(request)
            sequence = request.sequence
            sequence.request = None
            sequence.trim()
            self.seal(sequence, sequence.num_computed // self.pool.block_size - 1)
            if sequence.block_table:
                self.park(sequence)
        self.decoding.remove(requests)

    def start_decoding(self, requests: Iterable[Request]) -> None:
        """Requests that have sampled their first token compute one token a step from now on."""
        requests = list(requests)
        for request in requests:
            del self.prefilling[request]
        if requests:
            self.decoding.add(requests)

    def park(self, sequence: Sequence) -> None:
        (self.idle_parents if sequence.num_children else self.idle)[id(sequence)] = sequence

    def unpark(self, sequence: Sequence) -> bool:
        """Whether the sequence was parked."""
        key = id(sequence)
        return (self.idle.pop(key, None) or self.idle_parents.pop(key, None)) is not None

    def repark(self, sequence: Sequence) -> None:
        """To be called when a sequence has its first open fork, or no longer any."""
        if self.unpark(sequence):
            self.park(sequence)

    def tail_is_shared(self, request: Request) -> None:
        """A running sequence was forked: its next write may need a copy of the block."""
        if request in self.running and request not in self.prefilling:
            self.decoding.mark_shared(request)

    def seal(self, sequence: Sequence, first: int) -> None:
        """Lets others find the sequence's full blocks from number `first` on."""
        if self.prefix_caching:
            for index in range(max(first, 0), sequence.num_computed // self.pool.block_size):
                self.pool.seal(sequence.block_table[index], sequence.block_hash(index))

    def schedule(self) -> list[Chunk]:
        """Gives every decoding row its block and chooses the step's chunks; shared tails are copied before it returns.

        Raises:
            OutOfBlocks: one sequence alone does not fit the KV cache; it runs no longer, and the others go on.
        """
        self._reserve_decoding()
        budget = self.max_batch_tokens - len(self.decoding)
        chunks: list[Chunk] = []
        for request in list(self.prefilling):
            if budget and request in self.running:  # an earlier one may have preempted it
                budget -= self._add_chunk(request, budget, chunks)
        preempted = self.preemptions
        while self.waiting and budget and len(self.running) < self.max_num_seqs and self.preemptions == preempted:
            request = self.waiting[0]
            if not request.sequence.block_table and self.prefix_caching:
                request.sequence.take_cached()
            missing = self._missing_blocks(request.sequence, min(request.pending, budget))
            if self.running and missing + self._watermark > self.pool.num_free:
                break  # those that run will finish and give blocks back
            self.waiting.popleft()
            request.sequence.has_run = True
            self.running[request] = self.prefilling[request] = None
            budget -= self._add_chunk(request, budget, chunks)
        self._flush()
        return chunks

    def reserve_ahead(self) -> bool:
        """Moves every decoding row one token on, behind the one that is being computed, and gives it a block.

        Returns False, having changed nothing, when another request's turn may come first, when all runs end with the
        token that is being computed, or when blocks would have to be taken from others.
        """
        batch = self.decoding
        if self.prefilling or (self.waiting and len(self.running) < self.max_num_seqs):
            return False
        if not len(batch) or (batch.position + 2 >= batch.limit).all():
            return False
        batch.position[:] += 1
        rows = batch.rows_to_reserve()
        if len(rows) > self.pool.num_free:
            batch.position[:] -= 1
            return False
        for row in rows:
            batch.requests[row].sequence.num_computed = int(batch.position[row])
        self._reserve_decoding()
        self._flush()
        return True

    def _reserve_decoding(self) -> None:
        batch, preempted = self.decoding, self.preemptions
        rows = batch.rows_to_reserve()
        for row, request in zip(rows, [batch.requests[row] for row in rows], strict=True):
            if request not in self.running:
                continue  # preempted for one before it
            self.seal(request.sequence, request.sequence.num_computed // self.pool.block_size - 1)
            if self._reserve(request, 1, []):
                batch.reserved(row if self.preemptions == preempted else batch.requests.index(request))
            elif len(self.running) > 1 or self.waiting:
                self._preempt(request)
            else:
                self.remove({request})
                raise self._too_long(request)

    def _add_chunk(self, request: Request, budget: int, chunks: list[Chunk]) -> int:
        sequence, count = request.sequence, min(request.pending, budget)
        if not self._reserve(request, count, chunks):
            if not chunks and not len(self.decoding):
                self.remove({request})
                raise self._too_long(request)
            self._preempt(request)  # the others go on, and make room when they end
            return 0
        start = sequence.num_computed
        if count == 0 and (sequence.last_hidden is not None or not request.samples):
            chunks.append(Chunk(request, start, start))
        elif count == 0:
            chunks.append(Chunk(request, start - 1, start, writes=False))
        else:
            chunks.append(Chunk(request, start, start + count))
        return max(count, 1)

    def _reserve(self, request: Request, count: int, chunks: list[Chunk]) -> bool:
        """Blocks of its own for the sequence's next `count` tokens, at others' expense if need be.

        `chunks`: those of the step so far; who has one keeps its KV.
        """
        sequence = request.sequence
        while count:
            try:
                copy = self.pool.writable(sequence.block_table, sequence.num_computed)
                if copy is not None:
                    self._copies.append(copy)
                for _ in range(self._missing_blocks(sequence, count)):
                    sequence.block_table.append(self.pool.allocate())
                return True
            except OutOfBlocks:
                if not self._make_room(request, chunks):
                    return False
        return True

    def _missing_blocks(self, sequence: Sequence, count: int) -> int:
        return -(-(sequence.num_computed + count) // self.pool.block_size) - len(sequence.block_table)

    def _make_room(self, request: Request, chunks: list[Chunk]) -> bool:
        """Drops the KV of somebody who has no chunk in this step. False when nobody is left."""
        self._flush()  # a block about to be freed may be the source of a copy
        for idle in (self.idle, self.idle_parents):
            if idle:
                next(iter(idle.values())).release_blocks()
                return True
        for waiting in reversed(self.waiting):
            if waiting.sequence.block_table:
                waiting.sequence.release_blocks()
                return True
        scheduled = {chunk.request for chunk in chunks}
        victims = [r for r in reversed(self.running) if r is not request and r not in scheduled]
        if not victims:
            return False
        self._preempt(next((r for r in victims if r.sequence.num_children == 0), victims[0]))
        return True

    def _preempt(self, request: Request) -> None:
        request.sequence.release_blocks()
        del self.running[request]
        self.prefilling.pop(request, None)
        self.decoding.remove({request})
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _too_long(self, request: Request) -> OutOfBlocks:
        length = len(request.sequence)
        return OutOfBlocks(
            f"a sequence of {length} tokens does not fit the KV cache of {self.pool.num_blocks} blocks of "
            f"{self.pool.block_size} tokens; raise kv_cache_bytes"
        )

    def _flush(self) -> None:
        if self._copies:
            self._copy_blocks(self._copies)
            self._copies = []

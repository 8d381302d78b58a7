"""Continuous batching: every live sequence has pending tokens, and a step computes some of them."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine.block_pool import BlockCopy, BlockPool, OutOfBlocks
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence


@dataclass(eq=False, slots=True)
class Request:
    """One run of a sequence: from `start` tokens on until a stop token or `limit` tokens in all.

    `limit == start` asks for no token: the sequence is only prefilled.
    """

    sequence: Sequence
    params: SamplingParams
    seed: int
    start: int
    limit: int
    stop_ids: frozenset[int]
    index: int = 0
    running: bool = False
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Tokens without KV. 0 after a fork from computed KV: then the last token's query runs, nothing is written."""
        return len(self.sequence.token_ids) - self.sequence.num_computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens start … stop-1 of a request's sequence, computed in this step.

    With `writes` False it is the last token alone, whose KV is there: its query is wanted, to sample what follows.
    """

    request: Request
    start: int
    stop: int
    writes: bool = True


class Scheduler:
    """Decodes first, then prefill in chunks, up to `max_batch_tokens` a step and `max_num_seqs` running.

    When blocks run out, idle sequences lose their KV first and then the latest running request goes back to the queue;
    both are computed again later (recompute), so no token is lost.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_batch_tokens: int,
        max_num_seqs: int,
        open_sequences: Callable[[], Iterable[Sequence]],
        copy_blocks: Callable[[list[BlockCopy]], None],
    ):
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self._open_sequences = open_sequences
        self._copy_blocks = copy_blocks
        self._copies: list[BlockCopy] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        request.sequence.running = True
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Takes a finished or aborted request out."""
        request.sequence.running = False
        (self.running if request.running else self.waiting).remove(request)

    def schedule(self) -> list[Chunk]:
        """Chooses the step's chunks and gives them blocks; tail blocks are copied before it returns.

        Raises:
            OutOfBlocks: one sequence alone does not fit the KV cache.
        """
        budget = self.max_batch_tokens
        chunks: list[Chunk] = []
        for request in sorted(self.running, key=lambda request: request.pending > 1):
            if budget and request.running:  # an earlier one may have preempted it
                budget -= self._admit(request, budget, chunks)
        preempted = self.preemptions
        while self.waiting and budget and len(self.running) < self.max_num_seqs and self.preemptions == preempted:
            request = self.waiting[0]
            if chunks and self._missing_blocks(request.sequence, min(request.pending, budget)) > self.pool.num_free:
                break  # those that run will finish and give blocks back
            self.running.append(self.waiting.popleft())
            request.running = True
            budget -= self._admit(request, budget, chunks)
        self._flush()
        return chunks

    def _admit(self, request: Request, budget: int, chunks: list[Chunk]) -> int:
        count = min(request.pending, budget)
        while True:
            try:
                self._reserve(request.sequence, count)
                break
            except OutOfBlocks as error:
                if self._make_room(request, chunks):
                    continue
                if not chunks:
                    length = len(request.sequence)
                    raise OutOfBlocks(f"a sequence of {length} tokens does not fit the KV cache: {error}") from error
                self._preempt(request)  # the others go on, and make room when they end
                return 0
        start = request.sequence.num_computed
        chunks.append(Chunk(request, start, start + count) if count else Chunk(request, start - 1, start, writes=False))
        return max(count, 1)

    def _reserve(self, sequence: Sequence, count: int) -> None:
        if count == 0:
            return
        copy = self.pool.writable(sequence.block_table, sequence.num_computed)
        if copy is not None:
            self._copies.append(copy)
        for _ in range(-(-(sequence.num_computed + count) // self.pool.block_size) - len(sequence.block_table)):
            sequence.block_table.append(self.pool.allocate())

    def _missing_blocks(self, sequence: Sequence, count: int) -> int:
        return -(-(sequence.num_computed + count) // self.pool.block_size) - len(sequence.block_table) + 1

    def _make_room(self, request: Request, chunks: list[Chunk]) -> bool:
        """Drops the KV of somebody who has no part in this step. False when nobody is left."""
        self._flush()  # a block about to be freed may be the source of a copy
        for sequence in self._open_sequences():
            if not sequence.running and sequence.block_table:
                sequence.drop_kv()
                return True
        scheduled = {id(chunk.request) for chunk in chunks}
        for victim in reversed(self.running):
            if victim is not request and id(victim) not in scheduled:
                self._preempt(victim)
                return True
        return False

    def _preempt(self, request: Request) -> None:
        request.sequence.drop_kv()
        self.running.remove(request)
        request.running = False
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _flush(self) -> None:
        if self._copies:
            self._copy_blocks(self._copies)
            self._copies = []

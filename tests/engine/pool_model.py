"""An independent model of the KV: whose every block is, and what every slot holds, kept from outside the engine."""

from collections.abc import Sequence as Seq
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from engine import LLM, Sequence
from engine.batch import DecodeBatch
from engine.block_pool import BlockCopy
from engine.scheduler import Chunk


class PoolModel:
    """Watches an engine's writes and copies and knows, of each slot, the whole path of the token whose KV is there.

    A path is a 64-bit hash of a token and all before it: token ids, image content and place, weights. So one comparison
    of integers says that a sequence's KV is that of its own tokens in their order, computed with the present weights.
    """

    def __init__(self, llm: LLM):
        self.llm = llm
        self.size = llm.pool.block_size
        self.slots = np.zeros(llm.pool.num_blocks * self.size, dtype=np.int64)
        self.sealed: dict[bytes, tuple[bytes, int]] = {}  # digest -> (root of the cache then, path at the block's end)
        self._paths: WeakKeyDictionary[Sequence, tuple[int, list[int]]] = WeakKeyDictionary()  # version, hashes
        self._step, self._copy, self._seal = llm.runner.step, llm.kv.copy, llm.pool.seal
        llm.runner.step = self._watch_step  # type: ignore[method-assign]
        self._burst, llm.runner.burst = llm.runner.burst, self._watch_burst  # type: ignore[method-assign]
        llm.scheduler._copy_blocks = self._watch_copy
        llm.pool.seal = self._watch_seal  # type: ignore[method-assign]

    def paths(self, sequence: Sequence) -> list[int]:
        version, known = self._paths.get(sequence, (-1, []))
        if version != self.llm.weight_version:
            known = []
        spans = [span for span in sequence.spans if span.stop > len(known)]
        for index in range(len(known), len(sequence.token_ids)):
            image = None
            for span in spans:
                if span.start <= index < span.stop:
                    image = (sequence.images[sequence.spans.index(span)].key, index - span.start)
            before = known[-1] if known else self.llm.weight_version
            known.append(hash((before, sequence.token_ids[index], image)))
        self._paths[sequence] = (self.llm.weight_version, known)
        return known

    def _watch_step(self, batch: DecodeBatch, chunks: list[Chunk]):
        refs = self.references()
        written: list[int] = []
        for row, (request, slot) in enumerate(zip(batch.requests, batch.slots().tolist(), strict=True)):
            sequence = request.sequence
            index = len(sequence.token_ids) - 1
            assert batch.position[row] == index == sequence.num_computed, "a decoding row is at another token"
            assert batch.token[row] == sequence.token_ids[-1], "a decoding row computes another token"
            assert slot == self._slot(sequence, index), "a decoding row writes elsewhere"
            written.append(slot)
            self.slots[slot] = self.paths(sequence)[index]
        for chunk in chunks:
            sequence = chunk.request.sequence
            assert chunk.stop <= len(sequence.token_ids)
            if not chunk.writes or chunk.start == chunk.stop:
                continue
            assert chunk.start == sequence.num_computed, "a chunk begins elsewhere"
            for index in range(chunk.start, chunk.stop):
                written.append(self._slot(sequence, index))
                self.slots[written[-1]] = self.paths(sequence)[index]
        self._may_write(written, refs)
        return self._step(batch, chunks)

    def _watch_burst(self, batch: DecodeBatch, counts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]):
        refs, written = self.references(), []
        for request, position, count in zip(batch.requests, batch.position.tolist(), counts.tolist(), strict=True):
            sequence = request.sequence
            assert position == len(sequence.token_ids) - 1 == sequence.num_computed, (
                "a row of a burst is at another token"
            )
            assert sequence.spans == [] or sequence.spans[-1].stop <= position, "an image in a burst"
            written += [self._slot(sequence, index) for index in range(position, position + count)]
        self._may_write(written, refs)
        tokens, logprobs, entropies, made = self._burst(batch, counts, stops)
        for request, position, ids in zip(batch.requests, batch.position.tolist(), tokens, strict=True):
            path, count = self.paths(request.sequence)[position], int(made[batch.requests.index(request)])
            for index in range(position, position + count):
                self.slots[self._slot(request.sequence, index)] = path
                path = hash((path, int(ids[index - position]), None))
        return tokens, logprobs, entropies, made

    def _may_write(self, written: list[int], refs: npt.NDArray[np.int64]) -> None:
        assert len(set(written)) == len(written), "two tokens of a step go to one slot"
        for block in {slot // self.size for slot in written}:
            assert refs[block] == 1, f"block {block} is written and has {refs[block]} holders"
            assert self.llm.pool._hash[block] is None, f"block {block} is written and can be found in the prefix cache"

    def _watch_copy(self, copies: list[BlockCopy]) -> None:
        refs = self.references()
        for copy in copies:
            assert refs[copy.src] > 0 and refs[copy.dst] == 1, f"{copy}: {refs[copy.src]}, {refs[copy.dst]} holders"
            src, dst = copy.src * self.size, copy.dst * self.size
            self.slots[dst : dst + copy.valid] = self.slots[src : src + copy.valid]
            self.slots[dst + copy.valid : dst + self.size] = 0
        self._copy(copies)

    def _watch_seal(self, block: int, digest: bytes) -> None:
        end = int(self.slots[(block + 1) * self.size - 1])
        content = (self.llm.pool.root, end)
        assert self.sealed.setdefault(digest, content) == content, "one hash for two contents"
        self._seal(block, digest)

    def _slot(self, sequence: Sequence, index: int) -> int:
        return sequence.block_table[index // self.size] * self.size + index % self.size

    def references(self) -> npt.NDArray[np.int64]:
        """Holders of every block, counted over the block tables of all open sequences."""
        tables = [block for sequence in self.llm.sequences.values() for block in sequence.block_table]
        return np.bincount(np.array(tables, dtype=np.int64), minlength=self.llm.pool.num_blocks)

    def check(self, live: Seq[Sequence]) -> None:
        """References, accounting, the scheduler's queues, and the content of all computed KV."""
        llm, scheduler = self.llm, self.llm.scheduler
        assert set(llm.sequences) == {id(sequence) for sequence in live}
        refs = self.references()
        assert refs.tolist() == llm.pool.refs, "references are not the occurrences in block tables"
        assert llm.pool.num_free == int((refs == 0).sum()), "free blocks are miscounted"
        queued = {id(r.sequence) for r in scheduler.waiting} | {id(r.sequence) for r in scheduler.running}
        assert len(queued) == len(scheduler.waiting) + len(scheduler.running)
        assert set(scheduler.running) == set(scheduler.prefilling) | set(scheduler.decoding.requests)
        assert queued == {id(sequence) for sequence in live if sequence.running}
        parked = {id(s) for s in live if s.block_table and not s.running}
        assert {**scheduler.idle, **scheduler.idle_parents}.keys() == parked, "not all that idle with KV are parked"
        assert all(sequence.num_children == 0 for sequence in scheduler.idle.values())
        assert all(sequence.num_children > 0 for sequence in scheduler.idle_parents.values())
        for sequence in live:
            computed, table = sequence.num_computed, sequence.block_table
            assert len(table) == -(-computed // self.size) and len(set(table)) == len(table)
            if computed:
                starts = np.array(table, dtype=np.int64)[:, None] * self.size
                held = self.slots[(starts + np.arange(self.size)).ravel()[:computed]]
                assert held.tolist() == self.paths(sequence)[:computed], "a sequence holds KV of other tokens"

    def check_lists(self) -> None:
        """The free list holds each free block once, both ways round; the cache and the blocks' hashes agree."""
        pool, end = self.llm.pool, self.llm.pool.num_blocks
        block, walked = pool._next[end], []
        while block != end and len(walked) <= end:
            assert pool._prev[pool._next[block]] == block
            walked.append(block)
            block = pool._next[block]
        assert sorted(walked) == [b for b in range(end) if pool.refs[b] == 0], "the free list is not the free blocks"
        assert {b: h for h, b in pool._cached.items()} == {b: h for b, h in enumerate(pool._hash) if h is not None}
        for digest, block in pool._cached.items():
            root, path = self.sealed[digest]
            if root == pool.root:  # else nobody finds it
                assert self.slots[(block + 1) * self.size - 1] == path, "a cached block holds other tokens"

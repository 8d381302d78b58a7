"""What a step and a block cost does not grow with what has finished or is held: accesses are counted, not timed."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

from engine import LLM, SamplingParams, Sequence
from engine.block_pool import BlockPool, chain_hash

BLOCK = 8
PARAMS = SamplingParams(max_tokens=12, seed=1, ignore_eos=True, detokenize=False)


class Watched(Sequence):
    """A sequence that counts every look at it."""

    looks = 0

    def __getattribute__(self, name: str) -> Any:
        Watched.looks += 1
        return super().__getattribute__(name)


def looks_at_finished(path: Path, finished: int, free: int) -> tuple[int, int]:
    """(looks at that many idle sequences that hold KV, blocks taken from them) during a run with `free` free blocks."""
    size = LLM(path, kv_cache_bytes=1 << 20, block_size=BLOCK).kv.bytes_per_block
    llm = LLM(path, kv_cache_bytes=size * (finished + free), block_size=BLOCK, max_batch_tokens=64)
    rng = random.Random(3)
    idle = [llm.open([rng.randrange(7, 260) for _ in range(4)]) for _ in range(finished)]
    llm.run(idle, SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False))
    for parent in idle[: finished // 2]:
        parent.fork()  # parents, which are not the first to lose their KV, stand before the leaves
    running = [llm.open([10 + i] * 20) for i in range(3)]
    for sequence in idle:
        sequence.__class__ = Watched
    held, Watched.looks = llm.stats()["blocks_used"], 0
    for sequence in running:
        llm.submit(sequence, PARAMS)
    while llm.scheduler.has_work:
        llm.step()
    looks = Watched.looks
    taken = held + sum(len(sequence.block_table) for sequence in running) - llm.stats()["blocks_used"]
    return looks, taken


def test_a_step_does_not_look_at_what_has_finished(text_checkpoint: Path) -> None:
    for finished in (10, 1000):
        assert looks_at_finished(text_checkpoint, finished, free=40) == (0, 0)


def test_a_step_looks_at_finished_sequences_only_to_take_their_blocks(text_checkpoint: Path) -> None:
    few, many = looks_at_finished(text_checkpoint, 20, free=6), looks_at_finished(text_checkpoint, 1000, free=6)
    assert few == many and few[1] > 3


TOUCHES: Counter[str] = Counter()


class CountingList(list):
    def __getitem__(self, key):
        TOUCHES["entries"] += 1
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        TOUCHES["entries"] += 1
        super().__setitem__(key, value)

    def _whole(self, *_: object):
        raise AssertionError("a pass over all blocks")

    __iter__ = __contains__ = __reversed__ = index = remove = count = copy = sort = _whole  # type: ignore[assignment]


class CountingDict(dict):
    def __getitem__(self, key):
        TOUCHES["entries"] += 1
        return super().__getitem__(key)

    def _whole(self, *_: object):
        raise AssertionError("a pass over all cached blocks")

    __iter__ = keys = values = items = copy = _whole  # type: ignore[assignment]


def touches(num_blocks: int) -> dict[str, int]:
    """The most list and dictionary accesses that each verb needed for one block, in a pool that is about half full."""
    pool, rng, most = BlockPool(num_blocks, 4), random.Random(5), dict[str, int]()
    for name in ("refs", "_hash", "_next", "_prev"):
        setattr(pool, name, CountingList(getattr(pool, name)))
    pool._cached = CountingDict()
    tables: list[list[int]] = []

    def counted(verb: str, *arguments: Any) -> Any:
        before = TOUCHES["entries"]
        result = getattr(pool, verb)(*arguments)
        most[verb] = max(most.get(verb, 0), TOUCHES["entries"] - before)
        return result

    for step in range(8 * num_blocks):
        if pool.num_free and (len(tables) < num_blocks // 2 or rng.random() < 0.5):
            tables.append([counted("allocate")])
            counted("seal", tables[-1][0], chain_hash(pool.root, bytes([rng.randrange(256)])))
        else:
            counted("release", tables.pop(rng.randrange(len(tables))))
        if pool.num_free and tables:
            table = rng.choice(tables)
            counted("share", table)
            pool.release([counted("writable", list(table), 2).dst])
        found = counted("share_cached", chain_hash(pool.root, bytes([rng.randrange(256)])))
        if found is not None:
            pool.release([found])
        if step % 100 == 0:
            counted("reset_cache")
    return most


def test_every_verb_of_the_pool_touches_a_constant_number_of_entries() -> None:
    small, large = touches(64), touches(4096)
    assert small == large
    assert set(small) == {"allocate", "seal", "release", "share", "writable", "share_cached", "reset_cache"}
    assert max(large.values()) < 20 and large["reset_cache"] == 0

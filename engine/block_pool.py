"""KV blocks with reference counts and a prefix cache: forks share blocks, a write to a shared one goes to a copy."""

import hashlib
from dataclasses import dataclass


class OutOfBlocks(RuntimeError):
    """The KV cache is full."""


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy the first `valid` tokens of block `src` to block `dst`, in every layer."""

    src: int
    dst: int
    valid: int


class BlockPool:
    """Owns the block ids 0 … num_blocks-1 and who holds them; it never touches the KV itself.

    A block is held by `refs[block]` block tables, or free. A full block may be *sealed* with the hash of all tokens up
    to its end; when it becomes free it keeps its content, and `share_cached` finds it until `allocate` needs the space.

        allocate ->  [held, refs > 0]  -- release -->  free, without hash: taken next, at the front of the list
                         ^     |  seal                 free, with a hash:  taken last, least recently used first
                         |     v                            |
                         +---- share_cached <---------------+

    Every verb is O(1) a block: the free blocks are a doubly linked list inside two arrays, with a sentinel at its end.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.refs = [0] * num_blocks
        self.num_free = num_blocks
        self.peak_used = 0
        self.root = b""
        self._generation = 0
        self._hash: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._next = [*range(1, num_blocks + 1), 0]  # entry `num_blocks` is the sentinel, front and back in one
        self._prev = [num_blocks, *range(num_blocks)]
        self.reset_cache()

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def reset_peak(self) -> None:
        """`peak_used` counts anew, from what is used now."""
        self.peak_used = self.num_used

    def allocate(self) -> int:
        """Takes a free block, with one reference; its cached content is forgotten. Raises OutOfBlocks."""
        block = self._next[self.num_blocks]
        if block == self.num_blocks:
            raise OutOfBlocks(f"all {self.num_blocks} KV blocks are in use; raise kv_cache_bytes or close sequences")
        self._unlink(block)
        self._forget(block)
        self.refs[block] = 1
        return block

    def share(self, blocks: list[int]) -> None:
        """Adds a reference to each block."""
        for block in blocks:
            assert self.refs[block] > 0, f"block {block} is free and cannot be shared"
            self.refs[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Drops a reference of each block; those without one are free again, the last ones to be taken first."""
        for block in reversed(blocks):
            assert self.refs[block] > 0, f"block {block} was released twice"
            self.refs[block] -= 1
            if self.refs[block] == 0:
                self._link(block, front=self._hash[block] is None)

    def writable(self, block_table: list[int], num_computed: int) -> BlockCopy | None:
        """Makes the block that token `num_computed` goes to the table's own, if the table already reaches it.

        Returns the copy to run before the write, when the block was shared: the writer moves to a fresh block and the
        other holders keep the old one. Raises OutOfBlocks, changing nothing.
        """
        index, valid = divmod(num_computed, self.block_size)
        if index >= len(block_table):
            return None
        shared = block_table[index]
        if self.refs[shared] == 1:
            self._forget(shared)  # a fork may hold a full block of which it keeps the beginning
            return None
        own = self.allocate()
        block_table[index] = own
        self.refs[shared] -= 1
        return BlockCopy(shared, own, valid)

    # -- prefix cache --------------------------------------------------------------------

    def reset_cache(self) -> None:
        """Makes everything sealed so far unfindable, in O(1): chains of hashes now begin with another `root`."""
        self._generation += 1
        self.root = self._generation.to_bytes(16, "little")

    def seal(self, block: int, digest: bytes) -> None:
        """Says that a held block is full, for good, and what it holds. Of equal blocks the first one stays findable."""
        if self._hash[block] is None and digest not in self._cached:
            self._hash[block] = digest
            self._cached[digest] = block

    def share_cached(self, digest: bytes) -> int | None:
        """A block with this content and a new reference to it, or None."""
        block = self._cached.get(digest)
        if block is None:
            return None
        if self.refs[block] == 0:
            self._unlink(block)
        self.refs[block] += 1
        return block

    def _forget(self, block: int) -> None:
        digest = self._hash[block]
        if digest is not None:
            self._hash[block] = None
            del self._cached[digest]

    def _link(self, block: int, front: bool) -> None:
        end = self.num_blocks
        before, after = (end, self._next[end]) if front else (self._prev[end], end)
        self._next[before] = self._prev[after] = block
        self._prev[block], self._next[block] = before, after
        self.num_free += 1

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        self.num_free -= 1
        self.peak_used = max(self.peak_used, self.num_used)


def chain_hash(previous: bytes, content: bytes) -> bytes:
    """128 bits of what a block holds and of all before it."""
    return hashlib.blake2b(previous + content, digest_size=16).digest()

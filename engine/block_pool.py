"""KV blocks with reference counts: a fork shares blocks, a write to a shared block moves the writer to a copy."""

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

    Every verb is O(1) a block. A block is free, or held by `refs[block]` block tables.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self) -> int:
        """Takes a free block, with one reference. Raises OutOfBlocks."""
        if not self._free:
            raise OutOfBlocks(f"all {self.num_blocks} KV blocks are in use; raise kv_cache_bytes or close sequences")
        block = self._free.pop()
        self.refs[block] = 1
        return block

    def share(self, blocks: list[int]) -> None:
        """Adds a reference to each block."""
        for block in blocks:
            assert self.refs[block] > 0, f"block {block} is free and cannot be shared"
            self.refs[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Drops a reference of each block; those without one are free again."""
        for block in blocks:
            assert self.refs[block] > 0, f"block {block} was released twice"
            self.refs[block] -= 1
            if self.refs[block] == 0:
                self._free.append(block)

    def writable(self, block_table: list[int], num_computed: int) -> BlockCopy | None:
        """Makes the block that token `num_computed` goes to the table's own, if the table already reaches it.

        Returns the copy to run before the write, when the block was shared: the writer moves to a fresh block and the
        other holders keep the old one. Raises OutOfBlocks, changing nothing.
        """
        index, valid = divmod(num_computed, self.block_size)
        if index >= len(block_table) or self.refs[block_table[index]] == 1:
            return None
        shared = block_table[index]
        own = self.allocate()
        block_table[index] = own
        self.refs[shared] -= 1
        return BlockCopy(shared, own, valid)

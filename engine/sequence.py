"""A sequence of tokens and images whose KV is held, and which can be extended, run and forked at any token."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from engine.block_pool import chain_hash
from engine.images import ImageInput
from engine.positions import ImageSpan

if TYPE_CHECKING:
    from engine.llm import LLM
    from engine.scheduler import Request


class Sequence:
    """Made by `LLM.open` and `fork`; a context manager that closes.

    `num_computed` tokens have their KV in `block_table`; the rest is pending and is computed by the next run, so
    prompt, observation and last sampled token are one case. `last_hidden` [H] is the final hidden state of the last
    token where it is known, so that a fork at the end samples without computing anything.
    """

    def __init__(
        self,
        llm: LLM,
        token_ids: list[int],
        images: list[ImageInput],
        spans: list[ImageSpan],
        parent: Sequence | None = None,
    ):
        self.token_ids = token_ids
        self.images = images
        self.spans = spans
        self.num_computed = 0
        self.num_cached = 0
        self.has_run = False  # something of it was computed: KV found again later is its own
        self.block_table: list[int] = []
        self.last_hidden: Tensor | None = None
        self.request: Request | None = None
        self.closed = False
        self.num_children = 0
        # Sorting by path puts siblings side by side, the same way in every process.
        self.path: tuple[int, ...] = (*(parent.path if parent else ()), llm.next_ordinal())
        self._parent = weakref.ref(parent) if parent else None
        self._hashes: list[bytes] = []  # of the leading full blocks, as far as anybody asked
        self._hash_root = b""
        self._llm = llm
        llm.sequences[id(self)] = self

    def __len__(self) -> int:
        return len(self.token_ids)

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a sequence cannot be copied or pickled; fork it, or open its token_ids elsewhere")

    @property
    def running(self) -> bool:
        return self.request is not None

    def extend(self, token_ids: Seq[int] = (), images: Seq[Image.Image | ImageInput] = ()) -> None:
        """Appends an observation: tokens with one image placeholder (or all of them) an image. Computes nothing yet.

        Raises:
            ValueError: placeholders and images do not match, a token id is unknown, or the sequence would outgrow the
                model's context.
            RuntimeError: the sequence is closed or running.
        """
        self.check_open()
        if self.running:
            raise RuntimeError("a running sequence cannot be extended; let its run end first")
        inputs = self._llm.image_inputs(images)
        tokens = self._llm.expand(token_ids, inputs)
        self._llm.check_length(len(self) + len(tokens), [*self.images, *inputs])
        if inputs:
            self.spans = self._llm.processor.spans(tokens, inputs, self.spans, len(self))
        self.token_ids.extend(tokens)
        self.images.extend(inputs)
        if tokens:
            self.last_hidden = None

    def fork(self, n: int = 1, at: int | None = None) -> list[Sequence]:
        """`n` sequences that begin with the first `at` tokens (default: all) and share their computed KV.

        Full blocks are shared by reference and so is the partial tail, until its first writer copies the valid tokens.
        The parent stays usable, and may be closed first. The order of fork, extend and close does not matter.

        Raises:
            ValueError: `at` is outside 1 … len(self), or inside an image; `n` is negative.
            RuntimeError: the sequence is closed.
        """
        self.check_open()
        if n < 0:
            raise ValueError(f"fork n={n}: the number of forks must be 0 or more")
        at = len(self) if at is None else at
        if not 1 <= at <= len(self):
            raise ValueError(f"fork at={at}: the sequence has {len(self)} tokens, so `at` must be in 1 … {len(self)}")
        for span in self.spans:
            if span.start < at < span.stop:
                raise ValueError(
                    f"fork at={at} is inside an image, tokens {span.start} … {span.stop - 1}; fork before or after it"
                )
        kept = sum(span.stop <= at for span in self.spans)
        computed = min(at, self.num_computed)
        size = self._llm.pool.block_size
        blocks = self.block_table[: -(-computed // size)]
        if n > 0 and self.request is not None:
            self._llm.scheduler.tail_is_shared(self.request)
        children = []
        for _ in range(n):
            child = Sequence(self._llm, self.token_ids[:at], self.images[:kept], self.spans[:kept], self)
            self._llm.pool.share(blocks)
            child.block_table = list(blocks)
            child.num_computed = computed
            child.has_run = computed > 0
            child.last_hidden = self.last_hidden if at == len(self) else None
            child._hashes, child._hash_root = self._hashes[: at // size], self._hash_root
            if blocks:
                self._llm.scheduler.park(child)
            children.append(child)
        self._count_children(n)
        return children

    def drop_kv(self) -> None:
        """Gives the blocks back; the tokens stay and are computed again when the sequence next runs.

        Raises:
            RuntimeError: the sequence is running.
        """
        if self.running:
            raise RuntimeError("a running sequence needs its KV; let its run end or abort it first")
        self.release_blocks()

    def release_blocks(self) -> None:
        """`drop_kv` for the scheduler, which knows what runs."""
        self._llm.scheduler.unpark(self)
        blocks, self.block_table = self.block_table, []  # first: an interrupt may lose blocks, never free them twice
        self._llm.pool.release(blocks)
        self.num_computed = 0
        self.last_hidden = None

    def trim(self) -> None:
        """Gives back a block that was reserved for a token which will not be computed."""
        kept = -(-self.num_computed // self._llm.pool.block_size)
        if len(self.block_table) > kept:
            self._llm.pool.release(self.block_table[kept:])
            del self.block_table[kept:]

    def close(self) -> None:
        """Gives the blocks back for good; aborts a run in flight. Closing twice is fine."""
        if self.closed:
            return
        if self.running:
            self._llm.abort(self)
        self.drop_kv()
        self.closed = True
        del self._llm.sequences[id(self)]
        parent = self._parent() if self._parent else None
        if parent is not None:
            parent._count_children(-1)

    def _count_children(self, more: int) -> None:
        before = self.num_children
        self.num_children += more
        if (before == 0) != (self.num_children == 0):
            self._llm.scheduler.repark(self)

    def check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the sequence is closed; open or fork a new one")

    def check_owner(self, llm: LLM) -> None:
        if self._llm is not llm:
            raise ValueError("the sequence belongs to another engine, which holds its KV; open one here")

    # -- prefix cache --------------------------------------------------------------------

    def block_hash(self, index: int) -> bytes:
        """What full block `index` holds and all before it: its tokens, and of its image tokens the image and place."""
        pool = self._llm.pool
        if self._hash_root != pool.root:
            self._hashes, self._hash_root = [], pool.root
        size = pool.block_size
        while len(self._hashes) <= index:
            start = len(self._hashes) * size
            content = array("q", self.token_ids[start : start + size]).tobytes()
            for span, image in zip(self.spans, self.images, strict=True):
                if span.start < start + size and start < span.stop:
                    content += image.key + (start - span.start).to_bytes(8, "little", signed=True)
            self._hashes.append(chain_hash(self._hashes[-1] if self._hashes else pool.root, content))
        return self._hashes[index]

    def take_cached(self) -> None:
        """Begins with the blocks of the same tokens that somebody computed before, if there are any."""
        pool = self._llm.pool
        while (len(self.block_table) + 1) * pool.block_size <= len(self.token_ids):
            block = pool.share_cached(self.block_hash(len(self.block_table)))
            if block is None:
                break
            self.block_table.append(block)
        self.num_computed = len(self.block_table) * pool.block_size
        if not self.has_run:
            self.num_cached = self.num_computed

"""A sequence of tokens and images whose KV is held, and which can be extended, run and forked at any token."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from PIL import Image

from engine.positions import ImageSpan, place_image
from engine.processor import ImageInput

if TYPE_CHECKING:
    from engine.llm import LLM


class Sequence:
    """Made by `LLM.open` and `fork`; a context manager that closes.

    `num_computed` tokens have their KV in `block_table`; the rest is pending and is computed by the next run, so
    prompt, observation and last sampled token are one case.
    """

    def __init__(self, llm: LLM, token_ids: list[int], images: list[ImageInput], spans: list[ImageSpan]):
        self.token_ids = token_ids
        self.images = images
        self.spans = spans
        self.num_computed = 0
        self.block_table: list[int] = []
        self.running = False
        self.closed = False
        self._llm = llm
        llm.sequences[id(self)] = self

    def __len__(self) -> int:
        return len(self.token_ids)

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def extend(self, token_ids: Seq[int] = (), images: Seq[Image.Image | ImageInput] = ()) -> None:
        """Appends an observation: tokens with one image placeholder (or all of them) an image. Computes nothing yet.

        Raises:
            ValueError: placeholders and images do not match, or the sequence would outgrow the model's context.
            RuntimeError: the sequence is closed or running.
        """
        self.check_open()
        if self.running:
            raise RuntimeError("a running sequence cannot be extended; let its run end first")
        inputs = self._llm.image_inputs(images)
        tokens = self._llm.expand(token_ids, inputs)
        self._llm.check_length(len(self) + len(tokens))
        spans = list(self.spans)
        cursor, placeholder = 0, self._llm.config.image_token_id
        for image in inputs:
            assert placeholder is not None  # a text-only checkpoint has refused the image
            cursor = tokens.index(placeholder, cursor)
            spans.append(place_image(spans, len(self) + cursor, image.grid_thw, self._llm.merge))
            cursor += image.num_tokens
        self.token_ids.extend(tokens)
        self.images.extend(inputs)
        self.spans = spans

    def fork(self, n: int = 1, at: int | None = None) -> list[Sequence]:
        """`n` sequences that begin with the first `at` tokens (default: all) and share their computed KV.

        Full blocks are shared by reference and so is the partial tail, until its first writer copies the valid tokens.
        The parent stays usable, and may be closed first. The order of fork, extend and close does not matter.

        Raises:
            ValueError: `at` is outside 1 … len(self), or inside an image.
        """
        self.check_open()
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
        blocks = self.block_table[: -(-computed // self._llm.pool.block_size)]
        children = []
        for _ in range(n):
            child = Sequence(self._llm, self.token_ids[:at], self.images[:kept], self.spans[:kept])
            self._llm.pool.share(blocks)
            child.block_table = list(blocks)
            child.num_computed = computed
            children.append(child)
        return children

    def drop_kv(self) -> None:
        """Gives the blocks back; the tokens stay and are computed again when the sequence next runs."""
        self._llm.pool.release(self.block_table)
        self.block_table = []
        self.num_computed = 0

    def close(self) -> None:
        """Gives the blocks back for good; aborts a run in flight. Closing twice is fine."""
        if self.closed:
            return
        if self.running:
            self._llm.abort(self)
        self.drop_kv()
        self.closed = True
        del self._llm.sequences[id(self)]

    def check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the sequence is closed; open or fork a new one")

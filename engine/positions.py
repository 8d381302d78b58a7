"""Where the tokens of a sequence stand for the rotary embedding: text counts up, an image spans its grid."""

from bisect import bisect_right
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """An image inside a sequence. `height` and `width` count tokens (patches / merge); `base` is its first position."""

    start: int
    height: int
    width: int
    base: int

    @property
    def stop(self) -> int:
        return self.start + self.height * self.width

    @property
    def delta(self) -> int:
        """position - index for the text that follows: an image advances the position by its longer side."""
        return self.base + max(self.height, self.width) - self.stop


def place_image(spans: Seq[ImageSpan], start: int, grid_thw: Seq[int], merge: int) -> ImageSpan:
    """The span of a further image at token index `start`, after the images `spans`."""
    base = start + (spans[-1].delta if spans else 0)
    return ImageSpan(start, grid_thw[1] // merge, grid_thw[2] // merge, base)


def positions(spans: Seq[ImageSpan], start: int, stop: int) -> npt.NDArray[np.int64]:
    """Rotary positions (time, height, width) of tokens start … stop-1: [3, stop - start] int64.

    Qwen3-VL's rule: text takes the next position on all three axes; a token of an image takes (base, base + row,
    base + column).
    """
    index = np.arange(start, stop, dtype=np.int64)
    first = bisect_right([span.stop for span in spans], start)
    delta = spans[first - 1].delta if first else 0
    out = np.broadcast_to(index + delta, (3, stop - start)).copy()
    for span in spans[first:]:
        if span.start >= stop:
            break
        lo, hi = max(span.start, start), min(span.stop, stop)
        row, col = np.divmod(index[lo - start : hi - start] - span.start, span.width)
        out[:, lo - start : hi - start] = span.base
        out[1, lo - start : hi - start] += row
        out[2, lo - start : hi - start] += col
        out[:, hi - start :] = index[hi - start :] + span.delta
    return out

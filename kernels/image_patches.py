"""Images to the patches of a vision tower, in C++ on the CPU: Pillow's bicubic resize bit for bit, and the cutting.

Pillow does it in two passes with a rounding to 8 bits behind each. It begins with the rows, except that from version 13
on it begins with the columns where `rows_first` says no (src/libImaging/Resample.c); those images are left to Pillow.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from kernels._library import LOADED, MODE

BITS = 22
"""Behind the binary point of a tap, as in Pillow."""


def can_cut() -> bool:
    """Whether the C++ is there."""
    return LOADED and MODE in ("auto", "cpp")


def rows_first(size: tuple[int, int], out: tuple[int, int]) -> bool:
    """Whether Pillow resizes (height, width) `size` to `out` along the rows first, whatever its version."""
    lower, narrower = size[0] - out[0], size[1] - out[1]
    return lower <= 0 or lower <= 2 * narrower


def image_patches(
    images: Sequence[torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    table: torch.Tensor,
    patch: int,
    merge: int,
    frames: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each image its patches, [P, 3 * frames * patch²] fp32, and the pixels that they are cut from, [h, w, 3] uint8.

    images: [H, W, 4] uint8, whose fourth byte is not looked at; sizes: (h, w) to which each is resized, multiples of
    patch * merge; table: [3, 256] fp32, what a value of each channel becomes. Patches come in blocks of merge x merge,
    and each frame of one is the same. An image of its size already is only cut. Threads share the images. Raises
    ValueError for shapes that do not fit.
    """
    axes = []
    for image, (height, width) in zip(images, sizes, strict=True):
        axes += [*taps(image.shape[1], width), *taps(image.shape[0], height)]
    out = torch.ops.axpo.image_patches.default(list(images), axes, table, patch, merge, frames)
    return list(zip(out[::2], out[1::2], strict=True))


@lru_cache(maxsize=128)
def taps(size: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pillow's bicubic filter (a = -0.5) along one side: of each of `out` pixels the first of the `size` pixels that it
    is made from, [out], and their weights times 2^22, [out, k], both int32. k = 0 where nothing is resized."""
    if size == out:
        return torch.zeros(out, dtype=torch.int32), torch.zeros(out, 0, dtype=torch.int32)
    scale = size / out
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centre = (np.arange(out) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + support + 0.5).astype(np.int64), size) - first
    index = np.arange(count.max())
    x = np.abs((index + first[:, None] - centre[:, None] + 0.5) * (1.0 / stretch))
    near, far = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0)) * (index < count[:, None])
    total = np.zeros(out)
    for column in weights.T:  # one after another, as Pillow adds them
        total += column
    weights /= np.where(total == 0, 1.0, total)[:, None]
    fixed = weights * (1 << BITS)
    rounded = np.where(fixed < 0, -0.5 + fixed, 0.5 + fixed).astype(np.int32)
    return torch.from_numpy(first.astype(np.int32)), torch.from_numpy(rounded)


if LOADED:

    @torch.library.register_fake("axpo::image_patches")
    def _(images, axes, table, patch, merge, frames):
        out = []
        for i in range(len(images)):
            height, width = len(axes[4 * i + 2]), len(axes[4 * i])
            out.append(table.new_empty(height * width // patch**2, 3 * frames * patch**2))
            out.append(images[i].new_empty(height, width, 3))
        return out

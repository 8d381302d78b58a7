"""Images to patches in C++: Pillow's own resize, bit for bit, and plain numpy's cutting."""

import secrets

import numpy as np
import pytest
import torch
from PIL import Image

from kernels._library import LOADED
from kernels.image_patches import image_patches, rows_first, taps

pytestmark = pytest.mark.skipif(not LOADED, reason="the C++ kernels are not built")

TABLE = torch.arange(768, dtype=torch.float32).view(3, 256)


@pytest.fixture
def rng() -> np.random.Generator:
    seed = secrets.randbits(31)
    print(f"seed = {seed}")
    return np.random.default_rng(seed)


def noise(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Half of them black and white alone: their resize overshoots, and is clipped."""
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels if rng.random() < 0.5 else np.where(pixels < 128, np.uint8(0), np.uint8(255)))


def raw(image: Image.Image) -> torch.Tensor:
    data = bytearray(image.tobytes("raw", "RGBX"))
    return torch.frombuffer(data, dtype=torch.uint8).view(image.height, image.width, 4)


def test_pixels_are_pillows(rng: np.random.Generator) -> None:
    images, sizes = [], []
    while len(images) < 300:
        height, width, *size = (int(side) for side in rng.integers(1, 150, 4))
        size = (height if rng.random() < 0.2 else size[0], width if rng.random() < 0.2 else size[1])
        if rows_first((height, width), size):
            images.append(noise(rng, height, width))
            sizes.append(size)
    made = image_patches([raw(image) for image in images], sizes, TABLE, 1, 1, 1)
    for image, (height, width), (_, pixels) in zip(images, sizes, made, strict=True):
        expected = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(pixels.numpy(), expected, f"{image.height}x{image.width} to {height}x{width}")


@pytest.mark.parametrize(("patch", "merge", "frames"), [(4, 2, 2), (3, 1, 1), (2, 3, 3)])
def test_patches_are_cut_in_blocks(rng: np.random.Generator, patch: int, merge: int, frames: int) -> None:
    block = patch * merge
    rows, columns = 3, 2
    image = noise(rng, rows * block, columns * block)
    ((patches, pixels),) = image_patches([raw(image)], [(image.height, image.width)], TABLE, patch, merge, frames)
    np.testing.assert_array_equal(pixels.numpy(), np.asarray(image))
    values = np.asarray(image).transpose(2, 0, 1) + 256.0 * np.arange(3)[:, None, None]
    blocks = values.reshape(3, rows, merge, patch, columns, merge, patch).transpose(1, 4, 2, 5, 0, 3, 6)
    frame = blocks.reshape(-1, 3, 1, patch**2)
    expected = np.broadcast_to(frame, (len(frame), 3, frames, patch**2)).reshape(len(frame), -1)
    np.testing.assert_array_equal(patches.numpy(), expected)


def test_threads_and_company_do_not_change_a_bit(rng: np.random.Generator, with_threads) -> None:
    images = [raw(noise(rng, *(int(side) for side in rng.integers(8, 90, 2)))) for _ in range(7)]
    sizes = [(16, 24)] * len(images)
    together = with_threads(2, lambda: image_patches(images, sizes, TABLE, 4, 2, 2))
    alone = [image_patches([image], [size], TABLE, 4, 2, 2)[0] for image, size in zip(images, sizes, strict=True)]
    for (patches, pixels), (patches_alone, pixels_alone) in zip(together, alone, strict=True):
        assert torch.equal(patches, patches_alone) and torch.equal(pixels, pixels_alone)


def test_taps_sum_to_one(rng: np.random.Generator) -> None:
    for size, out in rng.integers(1, 300, (50, 2)).tolist():
        first, weights = taps(size, out)
        if size != out:
            sums = weights.sum(1)
            assert (sums - (1 << 22)).abs().max() <= weights.shape[1], f"{size} to {out}"
            assert first.min() >= 0 and int(first[-1]) < size


@pytest.mark.parametrize(
    ("shape", "size", "told"),
    [((8, 8, 3), (8, 8), r"uint8 \[height, width, 4\]"), ((8, 8, 4), (8, 12), "not multiples of 8")],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], size: tuple[int, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        image_patches([torch.zeros(shape, dtype=torch.uint8)], [size], TABLE, 4, 2, 2)
    with pytest.raises(ValueError, match=r"fp32 \[3, 256\]"):
        image_patches([torch.zeros(8, 8, 4, dtype=torch.uint8)], [(8, 8)], TABLE.double(), 4, 2, 2)

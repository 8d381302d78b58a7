"""Scenes of the mini task: coloured tiles with real handwritten digits over crops of real photographs, in numpy."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SIDE = 128  # pixels of a scene, at full resolution
CELL = 32  # a scene is a grid of 4 x 4 cells; one cell is one image token of the 32x32 overview
TRAIN_COLUMNS = 288  # of a photograph; the columns from here on are seen in held-out scenes only
INK = np.array([18.0, 18.0, 24.0], dtype=np.float32)
COLOURS = {
    "red": (226, 62, 54),
    "yellow": (240, 214, 56),
    "green": (72, 186, 76),
    "cyan": (72, 214, 222),
    "blue": (72, 112, 238),
    "purple": (186, 84, 222),
}
# (side of the tile, side of its digit) in pixels. The overview is 4 times smaller: the digit of a small tile is 5 to 6
# pixels there, hardly read; that of a large one 11 to 13. A crop of a quarter of the scene shows small tiles as
# the overview shows large ones, so that who reads these reads those.
SMALL = ((26, 22), (28, 23), (28, 24), (30, 25))
LARGE = ((52, 44), (56, 46), (56, 48), (60, 50))


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of a scene: box in pixels [x1, y1, x2, y2), digit box likewise, `source` the index of its digit image."""

    colour: str
    large: bool
    box: tuple[int, int, int, int]
    digit_box: tuple[int, int, int, int]
    digit: int
    source: int


def scene(rng: np.random.Generator, heldout: bool) -> tuple[np.ndarray, list[Tile]]:
    """Draws one scene: pixels [128,128,3] uint8 and its 3 to 5 tiles, every one of another colour.

    Held-out scenes use digit images and photograph columns that the others never show.
    """
    pixels = background(rng, heldout)
    number_large, number = int(rng.integers(1, 3)), int(rng.integers(3, 6))
    colours = rng.permutation(list(COLOURS))[:number]
    free = np.ones((SIDE // CELL, SIDE // CELL), dtype=bool)
    tiles = []
    for index, colour in enumerate(colours):
        large = index < number_large
        left, top, room = _place(rng, free, cells=2 if large else 1)
        tiles.append(_draw(rng, pixels, str(colour), large, left, top, room, heldout))
    return np.clip(pixels, 0, 255).astype(np.uint8), tiles


def background(rng: np.random.Generator, heldout: bool) -> np.ndarray:
    """A 128x128 crop of a photograph, perhaps mirrored, with its brightness varied: fp32 [128,128,3]."""
    stack = photographs()
    photo = stack[rng.integers(len(stack))]
    first, last = (TRAIN_COLUMNS, photo.shape[1] - SIDE) if heldout else (0, TRAIN_COLUMNS - SIDE)
    left, top = int(rng.integers(first, last + 1)), int(rng.integers(0, photo.shape[0] - SIDE + 1))
    crop = photo[top : top + SIDE, left : left + SIDE]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return crop * np.float32(rng.uniform(0.6, 1.0))


def _place(rng: np.random.Generator, free: np.ndarray, cells: int) -> tuple[int, int, int]:
    """Takes a free square of cells x cells and returns (left, top, side) of it in pixels."""
    # Squares lie on multiples of their own side, so that two large ones always fit.
    rows, columns = (range(0, size, cells) for size in free.shape)
    corners = [(r, c) for r in rows for c in columns if free[r : r + cells, c : c + cells].all()]
    row, column = corners[rng.integers(len(corners))]
    free[row : row + cells, column : column + cells] = False
    return column * CELL, row * CELL, cells * CELL


def _draw(
    rng: np.random.Generator,
    pixels: np.ndarray,
    colour: str,
    large: bool,
    left: int,
    top: int,
    room: int,
    heldout: bool,
) -> Tile:
    sizes = LARGE if large else SMALL
    side, glyph_side = sizes[rng.integers(len(sizes))]
    x, y = left + int(rng.integers(room - side + 1)), top + int(rng.integers(room - side + 1))
    pool = digit_pool(heldout)
    source = int(pool[rng.integers(len(pool))])
    slack = side - glyph_side
    glyph_x, glyph_y = (
        x + int(rng.integers(slack // 4, slack - slack // 4 + 1)),
        y + int(rng.integers(slack // 4, slack - slack // 4 + 1)),
    )
    shade = np.array(COLOURS[colour], dtype=np.float32) * np.float32(rng.uniform(0.9, 1.08))
    pixels[y : y + side, x : x + side] = shade
    enlarge = enlargement(glyph_side)
    alpha = (enlarge @ digits()[0][source] @ enlarge.T)[..., None]
    where = pixels[glyph_y : glyph_y + glyph_side, glyph_x : glyph_x + glyph_side]
    where += alpha * (INK - where)
    return Tile(
        colour=colour,
        large=large,
        box=(x, y, x + side, y + side),
        digit_box=(glyph_x, glyph_y, glyph_x + glyph_side, glyph_y + glyph_side),
        digit=int(digits()[1][source]),
        source=source,
    )


def asset_files() -> list[Path]:
    """The files that scenes are made of."""
    return [ASSETS / "mini_digits.npz", *sorted((ASSETS / "photos").glob("*.jpg"))]


@cache
def photographs() -> list[np.ndarray]:
    """The embedded photographs, each [256,416,3] fp32 in 0..255, in the order of their names."""
    paths = sorted((ASSETS / "photos").glob("*.jpg"))
    if not paths:
        raise FileNotFoundError(f"{ASSETS / 'photos'}: no photographs; run `python -m axpo.tasks.build_assets`")
    return [np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) for path in paths]


@cache
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ink [1797,8,8] fp32 in 0..1, labels [1797] uint8, heldout [1797] bool)."""
    with np.load(ASSETS / "mini_digits.npz") as data:
        return data["images"].astype(np.float32) / 16, data["labels"], data["heldout"]


@cache
def digit_pool(heldout: bool) -> np.ndarray:
    """Indices of the digit images of one split."""
    return np.flatnonzero(digits()[2] == heldout)


@cache
def enlargement(side: int) -> np.ndarray:
    """[side, 8] matrix of linear interpolation from 8 pixels to `side`, pixel centres aligned."""
    centres = np.clip((np.arange(side) + 0.5) * 8 / side - 0.5, 0, 7)
    low = np.minimum(centres.astype(int), 6)
    matrix = np.zeros((side, 8), dtype=np.float32)
    matrix[np.arange(side), low] = 1 - (centres - low)
    matrix[np.arange(side), low + 1] = centres - low
    return matrix

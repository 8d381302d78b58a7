"""Writes the embedded digits and photographs: `python -m axpo.tasks.build_assets [DIR]`.

It needs scikit-learn and scikit-image. The results are in the repository, so nothing at run time does.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).resolve().parent.parent / "assets"
# All public domain, CC0 or without known restrictions: axpo/assets/README.md says which is which.
PHOTOS = ("astronaut", "brick", "camera", "chelsea", "clock", "coffee", "coins", "grass", "hubble_deep_field", "rocket")
PHOTO_HEIGHT, PHOTO_WIDTH, PHOTO_QUALITY = 256, 416, 72
HELDOUT_FRACTION = 0.25


def build_assets(out: Path) -> None:
    """Writes `out`/mini_digits.npz and `out`/photos/*.jpg."""
    images, labels = load_digits()
    heldout = stratified_split(labels, HELDOUT_FRACTION, seed=0)
    (out / "photos").mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "mini_digits.npz", images=images, labels=labels, heldout=heldout)
    for name in PHOTOS:
        photo(name).save(out / "photos" / f"{name}.jpg", quality=PHOTO_QUALITY, optimize=True)


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's copy of the UCI digits: images [1797,8,8] uint8 in 0..16, labels [1797] uint8."""
    from sklearn.datasets import load_digits as load

    flat, labels = load(return_X_y=True)
    return np.asarray(flat, dtype=np.uint8).reshape(-1, 8, 8), np.asarray(labels, dtype=np.uint8)


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """[n] bool: True for the `fraction` of every class that training never shows."""
    rng = np.random.default_rng(seed)
    heldout = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        heldout[members[: round(len(members) * fraction)]] = True
    return heldout


def photo(name: str) -> Image.Image:
    """One of scikit-image's photographs, cut about its centre to 416 x 256."""
    from skimage import data

    image = Image.fromarray(getattr(data, name)()).convert("RGB")
    scale = max(PHOTO_WIDTH / image.width, PHOTO_HEIGHT / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - PHOTO_WIDTH) // 2, (image.height - PHOTO_HEIGHT) // 2
    return image.crop((left, top, left + PHOTO_WIDTH, top + PHOTO_HEIGHT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=ASSETS, help="directory to write to")
    out = parser.parse_args().out
    try:
        build_assets(out)
    except ImportError as error:
        sys.exit(f"{error}: install the build-time packages with `pip install scikit-learn scikit-image`")
    print(f"wrote {out / 'mini_digits.npz'} and {len(PHOTOS)} photographs in {out / 'photos'}")


if __name__ == "__main__":
    main()

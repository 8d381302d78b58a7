"""Checks of images that come from outside, so that a bad one is one clear message."""

import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError


def check_image(image: Image.Image, name: str) -> None:
    """Decodes `image` in place.

    Raises:
        ValueError: it has no pixels, too many of them (Pillow's decompression-bomb limit), or cannot be decoded.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if not image.width or not image.height:
        raise ValueError(f"{name} is {image.width}x{image.height}: it has no pixels")
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{name} is {image.width}x{image.height}, more than {limit} pixels; scale it down first")
    if type(image) is Image.Image:
        return  # not a file: its pixels are in memory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def load_image(source: Path | bytes, name: str = "the image") -> Image.Image:
    """The image in a file or in its bytes (`name` for messages) as RGB, upright.

    Raises:
        ValueError: it is missing, not an image, has too many pixels, or cannot be decoded.
    """
    name = name if isinstance(source, bytes) else str(source)
    try:
        with Image.open(BytesIO(encoded(source))) as image:
            check_image(image, name)
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} cannot be decoded: not an image format that Pillow knows") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from None


def encoded(source: Path | bytes) -> bytes:
    """An image as it is stored. Raises OSError for a path that is missing or no image file; see engine.prompts."""
    if isinstance(source, bytes):
        return source
    from engine.prompts import read_image  # brings torch, which data commands do without until they open an image

    return read_image(source)


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    out = BytesIO()
    image.save(out, "PNG")
    return out.getvalue()

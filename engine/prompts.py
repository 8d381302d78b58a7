"""What users give as a prompt, and what a checkpoint says of its end."""

import json
import os
import stat
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

LARGEST_IMAGE = 1 << 29  # bytes of a file: those of Pillow's most pixels, not compressed
Prompt = str | list[int] | dict[str, Any]
"""Text, token ids, or {"prompt" | "prompt_token_ids": …, "multi_modal_data": {"image": image or list}}."""


def parse_prompt(prompt: Prompt) -> tuple[str, list[int] | None, list[Any]]:
    """(text, token ids or None where the text counts, images).

    Raises:
        ValueError: a dict with neither or both of text and token ids.
    """
    if isinstance(prompt, str):
        return prompt, None, []
    if not isinstance(prompt, dict):
        return "", [int(token) for token in prompt], []
    if ("prompt" in prompt) == ("prompt_token_ids" in prompt):
        raise ValueError("a prompt dict needs exactly one of 'prompt' and 'prompt_token_ids'")
    images = (prompt.get("multi_modal_data") or {}).get("image", [])
    images = list(images) if isinstance(images, list | tuple) else [images]
    token_ids = prompt.get("prompt_token_ids")
    return prompt.get("prompt", ""), None if token_ids is None else list(token_ids), images


def open_image(image: Image.Image | str | Path) -> Image.Image:
    """Raises ValueError for a path that is missing, no file, or no image; TypeError for neither a path nor an image."""
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, str | Path):
        kind = type(image).__name__
        raise TypeError(
            f"an image is given as {kind}; give a PIL image (Image.fromarray makes one), a path or ImageInput"
        )
    try:
        opened = Image.open(BytesIO(read_image(image)))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"image '{image}' cannot be read ({error})") from error
    opened.filename = str(image)  # for messages
    return opened


def read_image(path: str | Path) -> bytes:
    """The whole image file, so that decoding waits for nothing and what becomes of the file meanwhile does not matter.

    Raises:
        OSError: it is missing, may not be read, is a folder, pipe or device, is larger than `LARGEST_IMAGE` bytes, or
            changed while it was read.
    """
    try:  # without O_NONBLOCK, opening a pipe would wait for the other end
        source = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except ValueError as error:  # a name with a null character
        raise OSError(f"no file name: {error}") from None
    with source:
        before = os.fstat(source.fileno())
        if not stat.S_ISREG(before.st_mode):
            kind = "a named pipe" if stat.S_ISFIFO(before.st_mode) else "a device"
            raise OSError(f"it is {kind}; give an image file")
        if before.st_size > LARGEST_IMAGE:
            raise OSError(f"it has {before.st_size} bytes, and no image has more than {LARGEST_IMAGE}")
        content = source.read(before.st_size + 1)
        after = os.fstat(source.fileno())
    if len(content) != before.st_size or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise OSError("it changed while it was read; give it when it is written")
    return content


def eos_token_ids(path: Path) -> frozenset[int]:
    """From generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        file = path / name
        if file.is_file():
            raw = json.loads(file.read_text())
            eos = raw.get("eos_token_id", raw.get("text_config", {}).get("eos_token_id"))
            if eos is not None:
                return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()

"""What users give as a prompt, and what a checkpoint says of its end."""

import base64
import json
import os
import stat
from collections.abc import Iterable
from io import BytesIO
from operator import index
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageOps

LARGEST_IMAGE = 1 << 29  # bytes of a file: those of Pillow's most pixels, not compressed
Prompt = str | list[int] | dict[str, Any]
"""Text, token ids, or {"prompt" | "prompt_token_ids": …, "multi_modal_data": {"image": image or list}}."""

IMAGE_PARTS = ("image", "image_url", "image_pil")


def as_prompts(given: Any) -> list[Prompt]:
    """One prompt or several, as a list; arrays and tensors are token ids."""
    if hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, str | dict):
        return [given]
    if not isinstance(given, list | tuple):
        raise ValueError(f"prompts are {type(given).__name__}; give text, token ids, a dict, or a list of such")
    return (
        [list(given)] if given and hasattr(given[0], "__index__") and not hasattr(given[0], "__len__") else list(given)
    )


def parse_prompt(prompt: Prompt) -> tuple[str, list[int] | None, list[Any]]:
    """(text, token ids or None where the text counts, images).

    Raises:
        TypeError: token ids that are no whole numbers.
        ValueError: a dict with neither or both of text and token ids, or with unknown keys.
    """
    if isinstance(prompt, str):
        return prompt, None, []
    if not isinstance(prompt, dict):
        return "", whole_numbers(prompt), []
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if (text is None) == (token_ids is None):
        raise ValueError("a prompt dict needs exactly one of 'prompt' and 'prompt_token_ids'")
    data = prompt.get("multi_modal_data") or {}
    known = ("prompt", "prompt_token_ids", "multi_modal_data")
    unknown = [repr(key) for key in prompt if key not in known] + [repr(key) for key in data if key != "image"]
    if unknown:
        raise ValueError(f"a prompt dict has {unknown[0]}; images are 'multi_modal_data': {{'image': image or list}}")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"'prompt' is {type(text).__name__}; it must be text, token ids are 'prompt_token_ids'")
    images = data.get("image")
    images = list(images) if isinstance(images, list | tuple) else [] if images is None else [images]
    return text or "", None if token_ids is None else whole_numbers(token_ids), images


def whole_numbers(token_ids: Iterable[Any]) -> list[int]:
    """Token ids as ints, of a list, an array or a tensor; TypeError for what are none."""
    try:
        return list(map(index, token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids))  # type: ignore
    except TypeError as error:
        raise TypeError(f"token ids must be whole numbers ({error}); text goes in as a string") from None


def split_images(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages as templates know them, {"type": "image"} where one stands, and the images.

    A part of a message is {"type": "text", "text": …}, {"type": "image", "image": …} or as OpenAI's
    {"type": "image_url", "image_url": {"url": …}}; see `open_image`.

    Raises:
        ValueError: a part of another type.
    """
    out, images = [], []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(f"messages[{number}] must be a dict with a 'role' and a 'content'")
        content = message.get("content")
        if isinstance(content, list | tuple):
            parts = []
            for part in content:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                if kind in IMAGE_PARTS:
                    image = part.get(kind)
                    image = image.get("url") if isinstance(image, dict) else image
                    if image is None:
                        raise ValueError(f"messages[{number}] has a part of type {kind!r} without its {kind!r}")
                    images.append(image)
                    part = {"type": "image"}
                elif kind != "text" or not isinstance(part.get("text"), str):
                    raise ValueError(
                        f"messages[{number}] has a part of type {kind!r}; give {{'type': 'text', 'text': …}} or one of "
                        f"the types {', '.join(IMAGE_PARTS)}"
                    )
                parts.append(part)
            message = {**message, "content": parts}
        out.append(message)
    return out, images


def open_image(image: Image.Image | str | Path) -> Image.Image:
    """A PIL image stays as it is; what is read from a path, a file: or data: URL is turned upright by its EXIF data.

    Raises:
        ValueError: a path that is missing, no file or no image, or another URL.
        TypeError: what is neither a path nor an image.
    """
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, str | Path):
        kind = type(image).__name__
        raise TypeError(
            f"an image is given as {kind}; give a PIL image (Image.fromarray makes one), a path or ImageInput"
        )
    name = str(image) if len(str(image)) < 200 else f"{str(image)[:60]}…"
    scheme, colon, rest = str(image).partition(":")
    try:
        if colon and scheme.lower() in ("http", "https"):
            raise ValueError("the engine fetches nothing: download it and give the file")
        if colon and scheme.lower() == "data":
            head, comma, data = rest.partition(",")
            if not (comma and head.endswith(";base64")):
                raise ValueError("a data: URL must be data:image/…;base64,…")
            content = base64.b64decode(data, validate=True)
        elif colon and scheme.lower() == "file":
            content = read_image(unquote(urlsplit(str(image)).path))
        else:
            content = read_image(Path(image).expanduser())
        return ImageOps.exif_transpose(Image.open(BytesIO(content)))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image '{name}' cannot be read ({error})") from error


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
    """From generation_config.json, else config.json, else the tokenizer's.

    Raises:
        ValueError: one of the files is not JSON, or the ids are none.
    """
    for name in ("generation_config.json", "config.json"):
        raw = _json(path / name)
        inner = raw.get("text_config") or {}
        eos = raw.get("eos_token_id", inner.get("eos_token_id"))
        if eos is not None:
            eos = eos if isinstance(eos, list) else [eos]
            if not all(isinstance(token, int) for token in eos):
                raise ValueError(f"{path / name}: eos_token_id is {eos}; it must be a token id or a list of them")
            return frozenset(eos)
    token = _json(path / "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    added = _json(path / "tokenizer.json").get("added_tokens", []) if text else []
    return frozenset(entry["id"] for entry in added if entry["content"] == text)


def _json(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: not a JSON object; fetch it again")
    return raw

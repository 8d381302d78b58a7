"""What users give as a prompt, and what a checkpoint says of its end."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

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
    """Raises ValueError for a file that is missing or no image, TypeError for what is neither a path nor an image."""
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, str | Path):
        kind = type(image).__name__
        raise TypeError(
            f"an image is given as {kind}; give a PIL image (Image.fromarray makes one), a path or ImageInput"
        )
    try:
        return Image.open(image)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"image '{image}' cannot be read ({error})") from error


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

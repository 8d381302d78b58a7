"""Sizes of a model as plain numbers, from a checkpoint's config.json or from the published Qwen3-VL configurations.

Imports neither torch nor the engine: a plan is made in a second on any machine, and no weights are needed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axpo.paths import ASSETS, MODELS


@dataclass(frozen=True, slots=True)
class TextShape:
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool
    tied: bool
    context: int

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of the keys or of the values of one token and layer."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class VisionShape:
    depth: int
    hidden: int
    intermediate: int
    heads: int
    patch_dim: int
    merge: int
    out_hidden: int
    positions: int
    levels: int
    """DeepStack levels, each with a merger of its own."""

    @property
    def merged(self) -> int:
        """Width of merge×merge patches side by side."""
        return self.hidden * self.merge**2


@dataclass(frozen=True, slots=True)
class Shape:
    text: TextShape
    vision: VisionShape | None
    image_token: int


def model_shape(path: str) -> Shape:
    """The shape of `model.path`: an embedded model, a checkpoint directory, or a published name that is not here.

    Raises:
        ValueError: neither a directory with a config.json of Qwen3-VL or Qwen3, nor a known name.
    """
    directory = ASSETS / path if path in MODELS else Path(path)
    file = directory / "config.json"
    if file.is_file():
        try:
            return read_shape(json.loads(file.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"model.path = {path!r}: {file} is not a Qwen3-VL or Qwen3 config ({error!r})") from None
    raw = published_config(path)
    if raw is None:
        raise ValueError(
            f"model.path = {path!r}: no config.json there; known without one: {', '.join(PUBLISHED)} (Qwen3-VL)"
        )
    return read_shape(raw)


def read_shape(raw: dict[str, Any]) -> Shape:
    """From the content of a config.json. Raises KeyError for a size that is missing."""
    text, vision = raw.get("text_config", raw), raw.get("vision_config")
    tied = bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    heads = text["num_attention_heads"]
    return Shape(
        TextShape(
            vocabulary=text["vocab_size"],
            hidden=text["hidden_size"],
            intermediate=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
            bias=text.get("attention_bias", False),
            tied=tied,
            context=text["max_position_embeddings"],
        ),
        None
        if vision is None
        else VisionShape(
            depth=vision["depth"],
            hidden=vision["hidden_size"],
            intermediate=vision["intermediate_size"],
            heads=vision["num_heads"],
            patch_dim=vision.get("in_channels", 3) * vision.get("temporal_patch_size", 2) * vision["patch_size"] ** 2,
            merge=vision.get("spatial_merge_size", 2),
            out_hidden=vision["out_hidden_size"],
            positions=vision["num_position_embeddings"],
            levels=len(vision.get("deepstack_visual_indexes", ())),
        ),
        raw.get("image_token_id", 151655),
    )


def published_config(path: str) -> dict[str, Any] | None:
    """config.json of the Qwen3-VL (2B, 4B, 8B, 32B) that a path such as Qwen/Qwen3-VL-8B-Thinking names, or None."""
    named = re.search(r"qwen3-vl-(2b|4b|8b|32b)(?![a-z0-9])", path.lower())
    size = named[1] if named else path if path in PUBLISHED else None
    if size is None:
        return None
    hidden, intermediate, layers, heads, tied, large_tower = PUBLISHED[size]
    depth, width, inner, levels = (27, 1152, 4304, [8, 16, 24]) if large_tower else (24, 1024, 4096, [5, 11, 17])
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tied,
        "image_token_id": 151655,
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_theta": 5000000,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        "vision_config": {
            "depth": depth,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_heads": 16,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": levels,
        },
    }


# hidden, intermediate, layers, heads, tied embeddings, the larger vision tower: of the public config.json files.
PUBLISHED = {
    "2b": (2048, 6144, 28, 16, True, False),
    "4b": (2560, 9728, 36, 32, True, False),
    "8b": (4096, 12288, 36, 32, False, True),
    "32b": (5120, 25600, 64, 64, False, True),
}

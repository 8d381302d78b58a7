"""Reads a Hugging Face `config.json` of Qwen3-VL or Qwen3 into plain frozen dataclasses."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    attention_bias: bool


@dataclass(frozen=True, slots=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    rope_theta: float

    @property
    def patch_dim(self) -> int:
        """Floats of one flattened patch, the width of `pixel_values`."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and special tokens of a checkpoint; `vision` is None for a text-only Qwen3."""

    model_type: str
    text: TextConfig
    vision: VisionConfig | None
    tie_word_embeddings: bool
    image_token_id: int | None
    banned_token_ids: tuple[int, ...]
    """Vision placeholders: meaningful only where an image stands, so they are never sampled."""

    @property
    def merge(self) -> int:
        """Patches a side of an image token; 1 without vision."""
        return self.vision.spatial_merge_size if self.vision else 1

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ModelConfig":
        """Parses `<path>/config.json`.

        Raises:
            FileNotFoundError: there is no such directory or it has no config.json.
            ValueError: the file is not JSON, or the architecture is not Qwen3-VL or Qwen3.
        """
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"model path '{path}': no config.json there; give a Hugging Face checkpoint directory"
            )
        try:
            raw = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: not valid JSON ({error})") from error
        model_type = raw.get("model_type")
        if model_type == "qwen3_vl":
            return _qwen3_vl(raw, file)
        if model_type == "qwen3":
            tied = bool(raw.get("tie_word_embeddings", False))
            return cls("qwen3", _text(raw, file), None, tied, None, ())
        raise ValueError(f"{file}: model_type is '{model_type}'; the engine serves 'qwen3_vl' and 'qwen3'")


def _qwen3_vl(raw: dict[str, Any], file: Path) -> ModelConfig:
    vision = raw["vision_config"]
    config = VisionConfig(
        depth=vision["depth"],
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_heads=vision["num_heads"],
        in_channels=vision.get("in_channels", 3),
        patch_size=vision["patch_size"],
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        spatial_merge_size=vision.get("spatial_merge_size", 2),
        out_hidden_size=vision["out_hidden_size"],
        num_position_embeddings=vision["num_position_embeddings"],
        deepstack_visual_indexes=tuple(vision.get("deepstack_visual_indexes", ())),
        rope_theta=_rope(vision).get("rope_theta", 10000.0),
    )
    _require(vision.get("hidden_act", "gelu_pytorch_tanh") == "gelu_pytorch_tanh", file, "vision hidden_act")
    special = [raw.get(f"{name}_token_id") for name in ("image", "video", "vision_start", "vision_end")]
    tied = raw.get("tie_word_embeddings", raw["text_config"].get("tie_word_embeddings", False))
    banned = tuple(sorted({int(token) for token in special if token is not None}))
    image_token_id = int(raw.get("image_token_id", 151655))
    return ModelConfig("qwen3_vl", _text(raw["text_config"], file), config, bool(tied), image_token_id, banned)


def _text(raw: dict[str, Any], file: Path) -> TextConfig:
    rope = _rope(raw)
    kind = rope.get("rope_type", rope.get("type", "default"))
    _require(kind in ("default", "mrope"), file, f"rope_type '{kind}'")
    _require(raw.get("hidden_act", "silu") == "silu", file, "hidden_act")
    _require(not raw.get("use_sliding_window", False), file, "use_sliding_window")
    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    time, height, width = rope.get("mrope_section") or (head_dim // 2, 0, 0)
    return TextConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 5e6))),
        mrope_section=(time, height, width),
        max_position_embeddings=raw["max_position_embeddings"],
        attention_bias=raw.get("attention_bias", False),
    )


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`, published checkpoints have `rope_scaling`."""
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def _require(condition: bool, file: Path, what: str) -> None:
    if not condition:
        raise ValueError(f"{file}: {what} is not supported; the engine serves standard Qwen3-VL and Qwen3 checkpoints")

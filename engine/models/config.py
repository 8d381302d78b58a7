"""Reads a Hugging Face `config.json` of Qwen3-VL or Qwen3 into plain frozen dataclasses."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = {"image": 151655, "video": 151656, "vision_start": 151652, "vision_end": 151653}
"""Ids of Qwen3-VL's placeholders, and how long its rotary sections are, where config.json does not say it."""
MROPE_SECTION = (24, 20, 20)


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
            ValueError: the file is not JSON, lacks a key or contradicts itself, or it is of another model.
        """
        file = checkpoint_directory(path) / "config.json"
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not valid JSON ({error})") from error
        model_type = raw.get("model_type") if isinstance(raw, dict) else None
        if model_type not in ("qwen3_vl", "qwen3"):
            raise ValueError(f"{file}: model_type is '{model_type}'; the engine serves 'qwen3_vl' and 'qwen3'")
        config = _Section(file, "", raw)
        config.require(not raw.get("quantization_config"), "quantization_config")
        if model_type == "qwen3_vl":
            return _qwen3_vl(config)
        return cls("qwen3", _text(config), None, bool(raw.get("tie_word_embeddings", False)), None, ())


def checkpoint_directory(path: str | Path) -> Path:
    """The directory, `~` expanded.

    Raises:
        FileNotFoundError: there is no such directory, or it is none of a checkpoint.
    """
    directory = Path(path).expanduser()
    if (directory / "config.json").is_file():
        return directory
    advice = "give a Hugging Face checkpoint directory"
    if directory.is_file():
        found = f"this is a file; give the directory that holds it, '{directory.parent}'"
    elif directory.is_dir():
        inner = next(iter(sorted(directory.glob("snapshots/*/config.json"))), None)  # of the hub's cache
        found = f"no config.json there; {advice if inner is None else f'give {str(inner.parent)!r}'}"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        found = f"no such directory; what is on the hub must be fetched first: hf download {path} --local-dir DIRECTORY"
    else:
        found = f"no such directory; {advice}"
    raise FileNotFoundError(f"model path '{path}': {found}")


@dataclass(frozen=True, slots=True)
class _Section:
    """A dict of a config.json; `name`: its key with a dot behind it, nothing for the whole file."""

    file: Path
    name: str
    raw: dict[str, Any]

    def inner(self, key: str) -> "_Section":
        inner = self.raw.get(key)
        if not isinstance(inner, dict):
            raise ValueError(f"{self.file}: it has no {key}; take the config.json that belongs to the weights")
        return _Section(self.file, f"{key}.", inner)

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of 1 or more; without a default the key must be there."""
        value = self.raw.get(key, default)
        if value is None:
            raise ValueError(f"{self.file}: {self.name}{key} is missing; take the config.json of these weights")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.file}: {self.name}{key} is {value!r}; it must be a whole number of 1 or more")
        return value

    def check(self, key: str, valid: bool, wanted: str) -> None:
        if not valid:
            value = repr(self.raw[key]) if key in self.raw else "missing"
            raise ValueError(f"{self.file}: {self.name}{key} is {value}; it must be {wanted}")

    def require(self, condition: bool, what: str) -> None:
        if not condition:
            served = "the engine serves standard Qwen3-VL and Qwen3 checkpoints"
            raise ValueError(f"{self.file}: {self.name}{what} is not supported; {served}")

    def rope(self) -> dict[str, Any]:
        """Published checkpoints have `rope_scaling` and `rope_theta`, transformers 5 writes `rope_parameters`; where
        there are both it takes the former."""
        rope = dict(self.raw.get("rope_scaling") or self.raw.get("rope_parameters") or {})
        if "rope_theta" in self.raw:
            rope.setdefault("rope_theta", self.raw["rope_theta"])
        return rope


def _qwen3_vl(config: _Section) -> ModelConfig:
    raw = config.raw
    text = _text(config.inner("text_config"))
    vision = _vision(config.inner("vision_config"), text)
    names = {f"{name}_token_id": default for name, default in SPECIAL_TOKENS.items()}
    special = {name: int(raw.get(name, default)) for name, default in names.items()}
    wanted = f"a token of the vocabulary of {text.vocab_size}"
    config.check("image_token_id", 0 <= special["image_token_id"] < text.vocab_size, wanted)
    tied = raw.get("tie_word_embeddings", raw["text_config"].get("tie_word_embeddings", False))
    banned = tuple(sorted({token for token in special.values() if 0 <= token < text.vocab_size}))
    return ModelConfig("qwen3_vl", text, vision, bool(tied), special["image_token_id"], banned)


def _vision(vision: _Section, text: TextConfig) -> VisionConfig:
    config = VisionConfig(
        depth=vision.size("depth"),
        hidden_size=vision.size("hidden_size"),
        intermediate_size=vision.size("intermediate_size"),
        num_heads=vision.size("num_heads"),
        in_channels=vision.size("in_channels", 3),
        patch_size=vision.size("patch_size"),
        temporal_patch_size=vision.size("temporal_patch_size", 2),
        spatial_merge_size=vision.size("spatial_merge_size", 2),
        out_hidden_size=vision.size("out_hidden_size"),
        num_position_embeddings=vision.size("num_position_embeddings"),
        deepstack_visual_indexes=tuple(vision.raw.get("deepstack_visual_indexes", (8, 16, 24))),
        rope_theta=float(vision.rope().get("rope_theta", 10000.0)),
    )
    levels = config.deepstack_visual_indexes
    blocks = f"different numbers of the {config.depth} blocks"
    vision.check("deepstack_visual_indexes", set(levels) <= set(range(config.depth)), blocks)
    vision.check("deepstack_visual_indexes", len(set(levels)) == len(levels), blocks)
    vision.check("out_hidden_size", config.out_hidden_size == text.hidden_size, f"text_config's {text.hidden_size}")
    vision.check("in_channels", config.in_channels == 3, "3: images are red, green and blue")
    heads = "a multiple of four times num_heads: a head turns pairs by row and by column"
    vision.check("hidden_size", config.hidden_size % (4 * config.num_heads) == 0, heads)
    vision.require(vision.raw.get("hidden_act", "gelu_pytorch_tanh") == "gelu_pytorch_tanh", "hidden_act")
    return config


def _text(text: _Section) -> TextConfig:
    raw, rope = text.raw, text.rope()
    kind = rope.get("rope_type", rope.get("type", "default"))
    text.require(kind in ("default", "mrope"), f"rope_type '{kind}'")
    text.require(raw.get("hidden_act", "silu") == "silu", "hidden_act")
    text.require(not raw.get("use_sliding_window", False), "use_sliding_window")
    text.require(set(raw.get("layer_types") or ()) <= {"full_attention"}, "layer_types with other than full_attention")
    if "rope_theta" not in rope:  # versions of transformers disagree about what it then is
        raise ValueError(f"{text.file}: {text.name}rope_theta is missing; take the config.json of these weights")
    hidden, heads = text.size("hidden_size"), text.size("num_attention_heads")
    # As in transformers: 128 where nothing is said, and null is one key-value head a query head.
    head_dim = hidden // heads if raw.get("head_dim", hidden) is None else text.size("head_dim", 128)
    kv_heads = heads if raw.get("num_key_value_heads", heads) is None else text.size("num_key_value_heads")
    text.check("num_key_value_heads", heads % kv_heads == 0, f"a divisor of num_attention_heads, {heads}")
    text.check("head_dim", head_dim % 2 == 0, "even: rotary positions turn pairs")
    time, height, width = rope.get("mrope_section") or MROPE_SECTION
    return TextConfig(
        vocab_size=text.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=text.size("intermediate_size"),
        num_layers=text.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope["rope_theta"]),
        mrope_section=(time, height, width),
        max_position_embeddings=text.size("max_position_embeddings"),
        attention_bias=bool(raw.get("attention_bias", False)),
    )

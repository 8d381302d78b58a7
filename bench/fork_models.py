"""Checkpoints and prompts of the fork benchmark: `mini`, and random Qwen3 text models of known shapes, written once."""

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine import ImageInput
from engine.models import ModelConfig
from engine.processor import Processor
from engine.weights import INDEX, SINGLE, canonical_name

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "axpo" / "assets" / "mini"
MODELS = ROOT / "build" / "models"
PIECE = 1 << 22  # random values drawn at once: an 8B checkpoint is written within tens of megabytes of memory
CONTEXT = 131_072
SCENE = 32  # pixels of a side of the image in mini's prefix


@dataclass(frozen=True, slots=True)
class TextShape:
    """Sizes of a Qwen3 text model with heads of 128."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


SHAPES = {
    "0.2b": TextShape(1024, 3072, 12, 16, 8, 32_000, True),  # 0.22 B
    "0.6b": TextShape(1024, 3072, 28, 16, 8, 151_936, True),  # Qwen3-0.6B
    "2b": TextShape(2048, 6144, 28, 16, 8, 151_936, True),  # the text models of Qwen3-VL 2B, 4B and 8B
    "4b": TextShape(2560, 9728, 36, 32, 8, 151_936, True),
    "8b": TextShape(4096, 12_288, 36, 32, 8, 151_936, False),
}
NAMES = ("mini", *SHAPES)


@dataclass(frozen=True, slots=True)
class Prefix:
    """Expanded token ids and the images that they have placeholders for."""

    token_ids: list[int]
    images: list[ImageInput]

    def __len__(self) -> int:
        return len(self.token_ids)


def checkpoint(name: str) -> Path:
    """The directory of one of NAMES, or a local Hugging Face directory. A random one is written where it is missing."""
    if name == "mini":
        return MINI
    if name in SHAPES:
        path = MODELS / name
        if not (path / "config.json").is_file():
            write_random(path, SHAPES[name])
        return path
    path = Path(name)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"--model {name}: neither one of {', '.join(NAMES)} nor a checkpoint directory")
    return path


def write_random(path: Path, shape: TextShape, head_dim: int = 128, seed: int = 0, shards: int = 1) -> None:
    """Writes a Qwen3 checkpoint with bf16 weights, tensor by tensor; config.json last, so that half of one is none."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = list(_tensors(shape, head_dim))
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else [SINGLE]
    places = {}
    for i, file in enumerate(files):
        part = dict(tensors[i * len(tensors) // shards : (i + 1) * len(tensors) // shards])
        _write_safetensors(path / file, part, seed + i)
        places |= dict.fromkeys(part, file)
    if shards > 1:
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    write_config(path, shape, head_dim)


def write_config(path: Path, shape: TextShape, head_dim: int = 128) -> None:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "max_position_embeddings": CONTEXT,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": shape.tied,
        "use_cache": True,
    }
    (path / "config.json").write_text(json.dumps(config, indent=1))


@torch.no_grad()
def fill_random(parameters: Iterable[tuple[str, torch.Tensor]], shape: TextShape, head_dim: int = 128) -> None:
    """What `write_random` would write, drawn where the parameters (by our names) lie; other values, as the seed is."""
    deviations = {canonical_name(name): deviation for name, (_, deviation) in _tensors(shape, head_dim)}
    for name, parameter in parameters:
        parameter.normal_(std=deviations[name]) if deviations[name] else parameter.fill_(1.0)


def random_prefix(path: Path, length: int, seed: int = 0) -> Prefix:
    """`length` random tokens; where the model sees, an image stands near their beginning.

    Raises:
        ValueError: the image does not fit into so short a prefix.
    """
    config = ModelConfig.from_pretrained(path)
    rng = np.random.default_rng(seed)
    if config.vision is None:
        return Prefix(rng.integers(config.text.vocab_size, size=length).tolist(), [])
    assert config.image_token_id is not None
    processor = Processor(path, config)
    image = processor.image(Image.fromarray(rng.integers(256, size=(SCENE, SCENE, 3), dtype=np.uint8)))
    raw = json.loads((path / "config.json").read_text())
    start, end = raw["vision_start_token_id"], raw["vision_end_token_id"]
    picture = [start, *[config.image_token_id] * image.num_tokens, end]
    # Special tokens have the highest ids; a text of random ones among them would hold placeholders without an image.
    text = rng.integers(min(config.banned_token_ids) - 16, size=max(length - len(picture), 0)).tolist()
    if len(text) < 2:
        raise ValueError(f"--prefix {length}: the image alone takes {len(picture)} tokens; give at least two more")
    return Prefix([text[0], *picture, *text[1:]], [image])


def _tensors(shape: TextShape, head_dim: int) -> Iterator[tuple[str, tuple[tuple[int, ...], float]]]:
    """(name, (shape, standard deviation)); deviation 0 means ones.

    Projections keep the scale of their input. Embeddings are small beside what the layers add, or a tied head would
    name the last token again for ever.
    """
    hidden, q, kv = shape.hidden, shape.heads * head_dim, shape.kv_heads * head_dim
    yield "model.embed_tokens.weight", ((shape.vocabulary, hidden), 0.02)
    for layer in range(shape.layers):
        sizes = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (shape.intermediate, hidden),
            "mlp.up_proj": (shape.intermediate, hidden),
            "mlp.down_proj": (hidden, shape.intermediate),
        }
        for name, size in sizes.items():
            yield f"model.layers.{layer}.{name}.weight", (size, size[1] ** -0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", ((hidden,), 0.0)
        for name in ("q_norm", "k_norm"):
            yield f"model.layers.{layer}.self_attn.{name}.weight", ((head_dim,), 0.0)
    yield "model.norm.weight", ((hidden,), 0.0)
    if not shape.tied:
        yield "lm_head.weight", ((shape.vocabulary, hidden), 0.02)


def _write_safetensors(file: Path, tensors: dict[str, tuple[tuple[int, ...], float]], seed: int) -> None:
    """The format is a length, a JSON header and the tensors' bytes, so nothing need be held but a piece of one."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (size, _) in tensors.items():
        end = offset + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    temporary = file.with_name(f".tmp-{file.name}")
    with temporary.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for size, deviation in tensors.values():
            left = math.prod(size)
            while left:
                count = min(left, PIECE)
                values = rng.standard_normal(count, dtype=np.float32) * np.float32(deviation)
                piece = torch.from_numpy(values + np.float32(deviation == 0)).to(torch.bfloat16)
                out.write(piece.view(torch.int16).numpy().tobytes())
                left -= count
    temporary.replace(file)

"""The published sizes of Qwen3-VL and Qwen3: each tensor has its place, none has another shape."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from engine.models import ModelConfig, Qwen3VL
from engine.weights import canonical_name

# hidden, intermediate, layers, query heads, tied; depth, hidden, intermediate and DeepStack levels of the vision tower
SMALL_TOWER, LARGE_TOWER = (24, 1024, 4096, [5, 11, 17]), (27, 1152, 4304, [8, 16, 24])
VL = {
    "2B": (2048, 6144, 28, 16, True, SMALL_TOWER, 2.1e9),
    "4B": (2560, 9728, 36, 32, True, SMALL_TOWER, 4.4e9),
    "8B": (4096, 12288, 36, 32, False, LARGE_TOWER, 8.8e9),
    "32B": (5120, 25600, 64, 64, False, LARGE_TOWER, 33.4e9),
}
TEXT = {
    "0.6B": (1024, 3072, 28, 16, True, 0.6e9),
    "1.7B": (2048, 6144, 28, 16, True, 1.7e9),
    "4B": (2560, 9728, 36, 32, True, 4.0e9),
    "8B": (4096, 12288, 36, 32, False, 8.2e9),
    "14B": (5120, 17408, 40, 40, False, 14.8e9),
    "32B": (5120, 25600, 64, 64, False, 32.8e9),
}


def text(hidden: int, intermediate: int, layers: int, heads: int) -> dict:
    return {
        "vocab_size": 151_936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
    }


def check(theirs: torch.nn.Module, directory: Path, parameters: float) -> None:
    with torch.device("meta"):
        ours = Qwen3VL(ModelConfig.from_pretrained(directory))
    expected = {canonical_name(name): tuple(p.shape) for name, p in theirs.named_parameters()}
    assert {name: tuple(p.shape) for name, p in ours.named_parameters()} == expected
    assert sum(p.numel() for p in ours.parameters()) == pytest.approx(parameters, rel=0.03)


@pytest.mark.parametrize("size", VL)
def test_qwen3_vl(size: str, tmp_path: Path) -> None:
    *sizes, tied, (depth, width, mlp, levels), parameters = VL[size]
    config = Qwen3VLConfig(
        text_config=text(*sizes) | {"rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20]}},
        vision_config={
            "depth": depth,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": sizes[0],
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": levels,
        },
        tie_word_embeddings=tied,
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = Qwen3VLForConditionalGeneration(config)
    check(theirs, tmp_path, parameters)


@pytest.mark.parametrize("size", TEXT)
def test_qwen3(size: str, tmp_path: Path) -> None:
    *sizes, tied, parameters = TEXT[size]
    config = Qwen3Config(**text(*sizes), tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = Qwen3ForCausalLM(config)
    check(theirs, tmp_path, parameters)

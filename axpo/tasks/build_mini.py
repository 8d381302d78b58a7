"""Writes an embedded model's Hugging Face directory: `python -m axpo.tasks.build_mini [--suite] OUT`.

The mini model has no weights in it: `axpo.sft` draws the first ones. The suite's model starts with the mini model's.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from axpo.paths import ASSETS
from axpo.tasks.grow import grow
from axpo.tasks.mini_tokenizer import mini_vocabulary
from axpo.tasks.suite_tokenizer import suite_vocabulary
from axpo.tasks.tokenizer import Vocabulary, build_tokenizer, chat_template

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 128, 4, 4, 2, 32, 384
VISION_HIDDEN, VISION_DEPTH, VISION_HEADS, VISION_INTERMEDIATE = 96, 3, 4, 256
PATCH, MERGE, TEMPORAL, OVERVIEW = 4, 2, 2, 32  # the overview is 32x32 pixels: 8x8 patches, 16 tokens
POSITIONS = 64  # learned vision positions, 8x8; other grids interpolate
MAX_TOKENS = 1024


def build_mini(out: str | Path) -> None:
    """The mini model: configuration, tokenizer, chat template and image processor, to directory `out`."""
    _build(Path(out), mini_vocabulary(), "float32")


def build_suite(out: str | Path) -> None:
    """The suite's model likewise: the mini model's layers and weights with another vocabulary."""
    _build(Path(out), suite_vocabulary(), "bfloat16")
    grow(ASSETS / "mini", Path(out))


def _build(out: Path, vocabulary: Vocabulary, dtype: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(vocabulary)
    numbers = tokenizer.get_vocab(with_added_tokens=True)
    ids = {token: numbers[token] for token in vocabulary.added}
    tokenizer.save(str(out / "tokenizer.json"))
    _write(out / "tokenizer_config.json", _tokenizer_config())
    (out / "chat_template.jinja").write_text(chat_template(), encoding="utf-8")
    _write(out / "config.json", _config(tokenizer.get_vocab_size(), ids, dtype))
    _write(out / "generation_config.json", _generation_config(ids))
    _write(out / "preprocessor_config.json", _preprocessor_config())


def _config(vocab_size: int, ids: dict[str, int], dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": dtype,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": vocab_size,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "max_position_embeddings": MAX_TOKENS,
            "rope_theta": 10000.0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "hidden_size": VISION_HIDDEN,
            "depth": VISION_DEPTH,
            "num_heads": VISION_HEADS,
            "intermediate_size": VISION_INTERMEDIATE,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": POSITIONS,
            "deepstack_visual_indexes": [1],
        },
    }


def _generation_config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": True,
        "temperature": 1.0,
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        # Not Qwen2Tokenizer: that class would put its own pre-tokeniser in place of ours.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_TOKENS,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }


def _preprocessor_config() -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessorPil",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": OVERVIEW**2, "longest_edge": OVERVIEW**2},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL,
        "merge_size": MERGE,
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="directory to write to")
    parser.add_argument("--suite", action="store_true", help="the suite's model instead of the mini model")
    given = parser.parse_args()
    (build_suite if given.suite else build_mini)(given.out)


if __name__ == "__main__":
    main()

"""Random tiny checkpoints, written by transformers, for the tests."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

IMAGE, VIDEO, VISION_START, VISION_END = 5, 6, 3, 4  # ids inside the small vocabularies below

Settings = dict[str, Any]


SIZES: Settings = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Of the text model in both families."""


def write_vl_checkpoint(
    path: Path, tie: bool, seed: int, text: Settings | None = None, vision: Settings | None = None
) -> Path:
    """A random Qwen3-VL of three layers with two DeepStack levels, patches of 4 pixels merged 2×2.

    text, vision: settings of the two configs that are to be others.
    """
    torch.manual_seed(seed)
    config = Qwen3VLConfig(
        text_config={
            **SIZES,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            **(text or {}),
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 48,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2],
            **(vision or {}),
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tie,
    )
    model = Qwen3VLForConditionalGeneration(config)
    _spread(model)
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "Qwen2VLImageProcessorFast",
                "patch_size": config.vision_config.patch_size,
                "temporal_patch_size": config.vision_config.temporal_patch_size,
                "merge_size": config.vision_config.spatial_merge_size,
                "size": {"shortest_edge": 64, "longest_edge": 4096},
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            }
        )
    )
    _write_tokenizer(path)
    return path


def write_text_checkpoint(path: Path, tie: bool, seed: int, text: Settings | None = None) -> Path:
    """A random Qwen3 of three layers; `text`: settings that are to be others."""
    torch.manual_seed(seed)
    settings: Settings = {
        **SIZES,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie,
    }
    config = Qwen3Config(**settings | (text or {}))
    model = Qwen3ForCausalLM(config)
    _spread(model)
    model.save_pretrained(path)
    _write_tokenizer(path)
    return path


def _spread(model: torch.nn.Module) -> None:
    """Larger weights than the library's 0.02, and no two norms alike, so that a misplaced tensor shows."""
    for name, parameter in model.named_parameters():
        scale = 0.3 if "norm" in name else 2.0 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1
        noise = torch.randn_like(parameter) * scale
        parameter.data = parameter.data + noise if "norm" in name and name.endswith("weight") else noise


def _write_tokenizer(path: Path) -> None:
    """Bytes and a few special tokens: enough to encode any text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))

"""Floating-point operations of training on packed trees, by which micro-batches are balanced."""

import torch

from axpo.tree import PackedBatch
from engine.models import ModelConfig
from engine.models.config import TextConfig, VisionConfig


def training_flops(config: ModelConfig, batch: PackedBatch, *, freeze_vision: bool = False) -> float:
    """Operations of forward and backward on the batch: 2 a weight and token, 4·heads·head_dim a visible pair and layer.

    A backward pass counts twice its forward, and a frozen tower has none. What activation checkpointing computes again,
    and norms and activations, are left out. Additive: a row costs what its trees cost.
    """
    ends = batch.subtree_end.long()
    pairs = int((ends - torch.arange(len(ends), device=ends.device)).sum())
    flops = 3 * _text(config.text, batch.num_tokens, pairs, batch.labels.numel())
    if config.vision is not None:
        frames = [(h * w, count) for image in batch.images for count, h, w in [image.grid_thw]]
        patches = sum(size * count for size, count in frames)
        flops += (1 if freeze_vision else 3) * _vision(
            config.vision, patches, sum(s * s * count for s, count in frames)
        )
    return flops


def _text(text: TextConfig, tokens: int, pairs: int, predicted: int) -> float:
    width = text.num_heads * text.head_dim
    attention = text.hidden_size * (2 * width + 2 * text.num_kv_heads * text.head_dim)
    layer = attention + 3 * text.hidden_size * text.intermediate_size
    head = text.hidden_size * text.vocab_size
    return text.num_layers * (2.0 * layer * tokens + 4.0 * width * pairs) + 2.0 * head * predicted


def _vision(vision: VisionConfig, patches: int, pairs: int) -> float:
    """pairs: of patches that see each other."""
    hidden, merge = vision.hidden_size, vision.spatial_merge_size**2
    block = 4 * hidden**2 + 2 * hidden * vision.intermediate_size
    merged = hidden * merge
    mergers = (1 + len(vision.deepstack_visual_indexes)) * (merged**2 + merged * vision.out_hidden_size) / merge
    weights = vision.patch_dim * hidden + vision.depth * block + mergers
    return 2.0 * weights * patches + 4.0 * hidden * vision.depth * pairs

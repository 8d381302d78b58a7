"""Floating-point operations of training on packed trees, by which micro-batches are balanced and MFU is counted."""

from functools import cache

import torch

from axpo.plan.counts import Work
from axpo.plan.counts import training_flops as flops_of
from axpo.plan.shapes import Shape, TextShape, VisionShape
from axpo.tree import PackedBatch
from engine.models import ModelConfig


def training_flops(config: ModelConfig, batch: PackedBatch, *, freeze_vision: bool = False) -> float:
    """Model operations of an update on the batch, `axpo.plan.counts.training_flops`; a row costs as its trees do."""
    return flops_of(shape_of(config), work_of(batch), freeze_vision=freeze_vision)


def work_of(batch: PackedBatch) -> Work:
    """Tokens, visible pairs, predicted tokens, and patches with the pairs inside each frame."""
    ends = batch.subtree_end.long()
    frames = [(height * width, time) for image in batch.images for time, height, width in [image.grid_thw]]
    return Work(
        tokens=batch.num_tokens,
        pairs=int((ends - torch.arange(len(ends), device=ends.device)).sum()),
        predicted=batch.labels.numel(),
        patches=sum(size * count for size, count in frames),
        patch_pairs=sum(size * size * count for size, count in frames),
    )


@cache
def shape_of(config: ModelConfig) -> Shape:
    text, vision = config.text, config.vision
    return Shape(
        TextShape(
            vocabulary=text.vocab_size,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            layers=text.num_layers,
            heads=text.num_heads,
            kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            bias=text.attention_bias,
            tied=config.tie_word_embeddings,
            context=text.max_position_embeddings,
        ),
        None
        if vision is None
        else VisionShape(
            depth=vision.depth,
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            heads=vision.num_heads,
            patch_dim=vision.patch_dim,
            merge=vision.spatial_merge_size,
            out_hidden=vision.out_hidden_size,
            positions=vision.num_position_embeddings,
            levels=len(vision.deepstack_visual_indexes),
        ),
        config.image_token_id or 0,
    )

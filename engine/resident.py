"""The engine's own copy of a model: built without values, laid out for inference, filled from a checkpoint or later."""

from pathlib import Path
from typing import Literal

import torch

from engine.models import ModelConfig, Qwen3VL, fuse_projections, pack_projections
from engine.weights import load_weights

LoadFormat = Literal["auto", "dummy"]
"""auto reads the weights; dummy leaves them unfilled, for a caller that brings them."""


def resident_model(
    config: ModelConfig, path: Path, dtype: torch.dtype, device: torch.device, load_format: LoadFormat
) -> Qwen3VL:
    """For inference in `dtype`, with projections of the same input side by side. Raises as `load_weights`."""
    with torch.device("meta"):
        model = Qwen3VL(config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    pack_projections(model)
    fuse_projections(model)
    if load_format == "auto":
        load_weights(model, path)
    return model

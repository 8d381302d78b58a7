"""The models that the engine serves and the trainer trains: one definition, two attentions."""

from engine.models.config import ModelConfig, TextConfig, VisionConfig, checkpoint_directory
from engine.models.fused import adjacent_parameters, fuse_projections, to_empty
from engine.models.packed import PackedModel
from engine.models.packed_vision import PackedVision
from engine.models.qwen3_vl import Predict, Qwen3VL
from engine.models.vision import VisionFeatures, VisionInput

__all__ = [
    "ModelConfig",
    "PackedModel",
    "PackedVision",
    "Predict",
    "Qwen3VL",
    "TextConfig",
    "VisionConfig",
    "VisionFeatures",
    "VisionInput",
    "adjacent_parameters",
    "checkpoint_directory",
    "fuse_projections",
    "to_empty",
]

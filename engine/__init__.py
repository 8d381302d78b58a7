"""A paged-KV inference engine for Qwen3-VL with copy-on-write forks at any token."""

import engine._claim  # noqa: F401 — first: `kernels` must mean ours before anything imports it
from engine.block_pool import OutOfBlocks
from engine.images import ImageInput
from engine.llm import LLM
from engine.outputs import CompletionOutput, RequestOutput
from engine.processor import Processor
from engine.sampling_params import SamplingParams, derive_seed
from engine.sequence import Sequence

__all__ = [
    "LLM",
    "CompletionOutput",
    "ImageInput",
    "OutOfBlocks",
    "Processor",
    "RequestOutput",
    "SamplingParams",
    "Sequence",
    "derive_seed",
]

"""transformers as the engine's reference: prompts for both, and what it says of a greedy continuation."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3VLForConditionalGeneration

from engine import LLM
from engine.images import ImageInput
from engine.models import VisionInput
from engine.runner import Packed
from tests.engine.checkpoints import IMAGE, VISION_END, VISION_START

SIZES = [(32, 32), (24, 48), (64, 16), (8, 8), (37, 53)]


def random_prompt(rng: random.Random, llm: LLM, images: int) -> tuple[list[int], list[ImageInput]]:
    """Random text with `images` random pictures of several sizes in between."""
    tokens, inputs = [rng.randrange(7, 260) for _ in range(rng.randint(3, 12))], []
    for _ in range(images):
        width, height = rng.choice(SIZES)
        pixels = np.random.default_rng(rng.randrange(2**31)).integers(0, 256, (height, width, 3), dtype=np.uint8)
        inputs.append(llm.processor.image(Image.fromarray(pixels)))
        tokens += [VISION_START] + [IMAGE] * inputs[-1].num_tokens + [VISION_END]
        tokens += [rng.randrange(7, 260) for _ in range(rng.randint(0, 9))]
    return tokens, inputs


def reference_inputs(tokens: list[int], images: list[ImageInput]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([tokens])
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        out["pixel_values"] = torch.cat([image.pixel_values for image in images])
        out["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
        out["mm_token_type_ids"] = (ids == IMAGE).int()
    return out


def prefill_logits(llm: LLM, tokens: list[int], images: list[ImageInput]) -> torch.Tensor:
    """All positions' logits through the engine's own paged forward."""
    captured: list[torch.Tensor] = []
    llm.reset_prefix_cache()
    some_rows = llm.runner._hidden

    def every_row(packed: Packed, rows: np.ndarray, vision: VisionInput | None) -> torch.Tensor:
        captured.append(some_rows(packed, np.arange(len(packed.token_ids)), vision))
        return captured[-1][llm.runner._tensor(rows)]

    llm.runner._hidden = every_row
    with llm.open({"prompt_token_ids": tokens, "multi_modal_data": {"image": images}}) as sequence:
        llm.prefill([sequence])
    llm.runner._hidden = some_rows
    return llm.model.logits(torch.cat(captured))


def load_reference(path: Path, dtype: torch.dtype = torch.float32, rounded: bool = False) -> Any:
    """transformers' model; `rounded`: its weights are those of bf16, whatever it computes in."""
    vision = (path / "preprocessor_config.json").is_file()
    model = (Qwen3VLForConditionalGeneration if vision else AutoModelForCausalLM).from_pretrained(path, dtype=dtype)
    if rounded:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().to(dtype)
    return model.eval()


@torch.no_grad()
def reference_logits(reference: Any, tokens: list[int], images: list[ImageInput]) -> Tensor:
    """[len(tokens), V] fp32."""
    inputs = reference_inputs(tokens, images)
    if images:
        inputs["pixel_values"] = inputs["pixel_values"].to(reference.dtype)
    return reference(**inputs).logits[0].float()


def assert_greedy(llm: LLM, reference: Any, tokens: list[int], images: list[ImageInput], new: list[int]) -> None:
    """transformers chooses each of `new` where the engine chose it: then its own greedy continuation is the same.

    Two tokens that are best within 1e-4 of the logits' spread are a tie, which rounding decides.
    """
    logits = reference_logits(reference, tokens + new, images)[len(tokens) - 1 : -1]
    assert (lost_logit(llm, logits, new) <= 1e-4 * logits.std()).all()


def lost_logit(llm: LLM, logits: Tensor, chosen: list[int]) -> Tensor:
    """How far each chosen token's logit is below the best one that may be sampled; logits: [len(chosen), V]."""
    allowed = logits.clone()
    allowed[:, list(llm.config.banned_token_ids)] = -torch.inf
    return allowed.max(-1).values - allowed.gather(1, torch.tensor(chosen)[:, None])[:, 0]

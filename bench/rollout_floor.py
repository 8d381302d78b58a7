"""The least that a rollout can take: its matrix products alone, as many rows at a time as its steps have."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import LLM


@dataclass(slots=True)
class Products:
    """Rows of every product of a run: of each step its tokens and those whose hidden state is used; patches."""

    steps: list[tuple[int, int]] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, llm: LLM, run: Callable[[], Any]) -> "Products":
        """What one call of `run` computes."""
        products = cls()
        hidden, burst, vision = llm.runner._hidden, llm.runner.burst, llm.runner.vision

        def counted(packed: Any, rows: Any, images: Any) -> Tensor:
            products.steps.append((len(packed.token_ids), len(rows)))
            return hidden(packed, rows, images)

        def counted_burst(*args: Any) -> Any:
            drawn = burst(*args)
            made = drawn[3]  # tokens of each row
            for step in range(made.max()):
                rows = int((made > step).sum())
                products.steps.append((rows, rows))
            return drawn

        encode = vision.encode

        def counted_encode(images: list[Any]) -> Any:
            before = vision.encoded
            features = encode(images)
            if vision.encoded > before:
                products.patches.append(sum({i.key: len(i.pixel_values) for i in images}.values()))
            return features

        llm.runner._hidden, llm.runner.burst = counted, counted_burst  # type: ignore[method-assign]
        vision.encode = counted_encode
        try:
            run()
        finally:
            llm.runner._hidden, llm.runner.burst, vision.encode = hidden, burst, encode
        return products

    @torch.inference_mode()
    def seconds(self, llm: LLM) -> float:
        """Time of the products alone, each with the model's own weights, of rows of noise."""
        text, tower = llm.config.text, llm.model.model.visual
        layers: list[Any] = list(llm.model.model.language_model.layers)
        most = max([rows for rows, _ in self.steps] + self.patches)
        vision = [module for module in tower.modules() if isinstance(module, torch.nn.Linear)]
        merged = {id(m) for n, m in tower.named_modules() if "merger" in n}
        widths = {w.shape[1] for layer in layers for w in layer.fused[0] if w.dim() == 2}
        widths |= {linear.in_features for linear in vision} | {tower.config.patch_dim, text.hidden_size}
        noise = {width: torch.randn(most, width) for width in widths}

        def multiply(weight: Tensor, rows: int) -> None:
            F.linear(noise[weight.shape[1]][:rows], weight)

        start = time.perf_counter()
        for rows, used in self.steps:
            for layer in layers:
                _, qkv, _, _, o, _, gate_up, down = layer.fused[0]
                multiply(qkv, rows)
                for weight in (o, gate_up, down):
                    multiply(weight, used if layer is layers[-1] else rows)
            multiply(llm.model.head_weight, used)
        for patches in self.patches:
            multiply(tower.patch_embed.proj.weight.flatten(1), patches)
            for linear in vision:
                multiply(
                    linear.weight, patches // tower.config.spatial_merge_size**2 if id(linear) in merged else patches
                )
        return time.perf_counter() - start

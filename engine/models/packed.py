"""A small model's weights as the C++ steps read them: packed once for every version of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.models.qwen3_vl import DecoderLayer, Qwen3VL, mrope, mrope_table
from engine.models.vision import VisionInput
from kernels.packed import can_pack, pack_gate_up, pack_panels, packed_forward

if TYPE_CHECKING:
    from engine.memory import KVCache
    from engine.runner import Packed

LAYER_BYTES = 4 << 20
"""Of a layer's weights: those of more do not stay in a core's cache, and a product of all cores is faster."""


class PackedModel:
    """`Qwen3VL` for inference in fp32 on the CPU, where `serves` says so: the same function, other bits.

    What a row gives depends on its sequence alone, not on the batch, so a rollout is the same bits in any company.
    """

    def __init__(self, model: Qwen3VL, kv: KVCache):
        self.model = model
        self.kv = kv
        kv.whole_blocks = True
        self._scale = model.config.text.head_dim**-0.5
        self._axis = mrope_table(model.config.text, torch.device("cpu"))[0]
        self._angles = self._angles_of(256)
        self.refresh()

    @staticmethod
    def serves(model: Qwen3VL, kv: KVCache) -> bool:
        text = model.config.text
        layers = list(model.model.language_model.layers)
        weights = [parameter for parameter in layers[0].parameters() if parameter.dim() == 2]
        size = sum(weight.nbytes for weight in weights)
        plain = not text.attention_bias and all(isinstance(layer, DecoderLayer) for layer in layers)
        return plain and size <= LAYER_BYTES and can_pack(kv.data, *weights)

    @torch.no_grad()
    def refresh(self) -> None:
        """To be called when the weights have changed."""
        language = self.model.model.language_model
        self._layers = [tensor for layer in language.layers for tensor in _pack_layer(layer)]
        self._norm = language.norm.weight.detach().clone()
        self._embedding = language.embed_tokens.weight.detach()

    def hidden(self, step: Packed, wanted: Tensor, vision: VisionInput | None) -> Tensor:
        """Final hidden states [n, H] of the `wanted` rows of a step, [n] int64 and ascending."""
        features = vision.features if vision is not None else None
        if (highest := int(step.position_ids.max())) >= len(self._angles[0]):
            self._angles = self._angles_of(2 * highest)
        return packed_forward(
            torch.from_numpy(step.token_ids),
            torch.from_numpy(step.position_ids),
            self._embedding,
            self._layers,
            self._norm,
            (self._axis, *self._angles),
            self.kv.data,
            torch.from_numpy(step.slots),
            None if step.writes is None else torch.from_numpy(step.writes),
            torch.from_numpy(step.tables),
            torch.from_numpy(step.cu_seqlens),
            torch.from_numpy(step.context_lens),
            wanted,
            None if vision is None else vision.token_index,
            [] if features is None else [features.embeds, *features.deepstack],
            self.model.config.text.rms_norm_eps,
            self._scale,
        )

    def _angles_of(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos, sin [positions, D / 2] of a token that stands at the same position on all three axes."""
        cos, sin = mrope(torch.arange(positions).expand(3, -1), self.model.config.text)
        return cos.contiguous(), sin.contiguous()


def _pack_layer(layer: nn.Module) -> list[Tensor]:
    assert isinstance(layer, DecoderLayer)
    attention, mlp = layer.self_attn, layer.mlp
    keys_values = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
    return [
        layer.input_layernorm.weight.detach().clone(),
        pack_panels(attention.q_proj.weight),
        pack_panels(keys_values),
        attention.q_norm.weight.detach().clone(),
        attention.k_norm.weight.detach().clone(),
        pack_panels(attention.o_proj.weight),
        layer.post_attention_layernorm.weight.detach().clone(),
        pack_gate_up(mlp.gate_proj.weight, mlp.up_proj.weight),
        pack_panels(mlp.down_proj.weight),
    ]

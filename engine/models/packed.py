"""A small model's weights as the C++ steps read them: packed once for every version of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from engine.models.qwen3_vl import DecoderLayer, Qwen3VL, mrope, mrope_table
from engine.models.vision import VisionInput
from kernels.packed import can_pack, pack_gate_up, pack_panels, packed_decode, packed_forward

if TYPE_CHECKING:
    from engine.batch import DecodeBatch
    from engine.memory import KVCache
    from engine.runner import Packed

LAYER_BYTES = 4 << 20
"""Of a layer's weights: those of more do not stay in a core's cache, and a product of all cores is faster."""


class Weights(NamedTuple):
    """layers: nine tensors each, as `packed_forward` reads them; head: the LM head, packed. The embedding is shared."""

    layers: list[Tensor]
    norm: Tensor
    embedding: Tensor
    head: Tensor


class PackedModel:
    """`Qwen3VL` for inference in fp32 on the CPU, where `why_not` has nothing to say: the same function, other bits.

    What a row gives depends on its sequence alone, not on the batch, so a rollout is the same bits in any company.
    """

    def __init__(self, model: Qwen3VL, kv: KVCache):
        self.model = model
        self.kv = kv
        kv.whole_blocks = True
        self._scale = model.config.text.head_dim**-0.5
        self._axis = mrope_table(model.config.text, torch.device("cpu"))[0]
        self._angles = self._angles_of(256)
        self.release()

    @staticmethod
    def why_not(model: Qwen3VL, kv: KVCache) -> str | None:
        """What keeps the packed steps from serving this model over this cache, or None."""
        text = model.config.text
        layers = list(model.model.language_model.layers)
        weights = [parameter for parameter in layers[0].parameters() if parameter.dim() == 2]
        if (size := sum(weight.nbytes for weight in weights)) > LAYER_BYTES:
            return f"a layer's {size:,} bytes of weights are more than the {LAYER_BYTES:,} that stay in a core's cache"
        if text.attention_bias or not all(isinstance(layer, DecoderLayer) for layer in layers):
            return "they have no biases and no adapted layers"
        if not can_pack(kv.data, *weights):
            return "they are C++ for fp32 on the CPU, with sizes and blocks that are multiples of 16"
        return None

    def release(self) -> None:
        """Gives the packed weights back; they are packed anew when they are next used, with what they are then."""
        self._weights: Weights | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights held now."""
        weights = self._weights
        return 0 if weights is None else sum(t.nbytes for t in (*weights.layers, weights.norm, weights.head))

    @torch.no_grad()
    def _pack(self) -> Weights:
        if self._weights is None:
            language = self.model.model.language_model
            self._weights = Weights(
                [tensor for layer in language.layers for tensor in _pack_layer(layer)],
                language.norm.weight.detach().clone(),
                language.embed_tokens.weight.detach(),
                pack_panels(self.model.head_weight.detach()),
            )
        return self._weights

    def hidden(self, step: Packed, wanted: Tensor, vision: VisionInput | None) -> Tensor:
        """Final hidden states [n, H] of the `wanted` rows of a step, [n] int64 and ascending."""
        weights = self._pack()
        features = vision.features if vision is not None else None
        self._reach(int(step.position_ids.max()))
        return packed_forward(
            torch.from_numpy(step.token_ids),
            torch.from_numpy(step.position_ids),
            weights.embedding,
            weights.layers,
            weights.norm,
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

    def decode(
        self, batch: DecodeBatch, counts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64], banned: Tensor
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """`counts` [n] tokens of each row of `batch`, or as many as there are up to one of its `stops` [n, m].

        Returns tokens, logprobs, entropies [n, counts.max()] and how many of them there are, [n].
        """
        self._reach(int((batch.position + batch.delta + counts).max()))
        weights = self._pack()
        rows = np.stack([batch.token, batch.position, batch.delta, batch.seed, counts])
        drawn = packed_decode(
            weights.embedding,
            weights.layers,
            weights.norm,
            weights.head,
            (self._axis, *self._angles),
            self.kv.data,
            torch.from_numpy(rows),
            torch.from_numpy(batch.temperature),
            torch.from_numpy(batch.tables()),
            torch.from_numpy(stops),
            banned,
            self.model.config.text.rms_norm_eps,
            self._scale,
        )
        tokens, logprobs, entropies, made = (column.numpy() for column in drawn)
        return tokens, logprobs, entropies, made

    def _reach(self, position: int) -> None:
        """Makes the table of angles long enough."""
        if position >= len(self._angles[0]):
            self._angles = self._angles_of(2 * position)

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

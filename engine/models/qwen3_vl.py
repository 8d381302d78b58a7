"""Qwen3-VL (and Qwen3) over packed tokens: the engine passes paged attention, the trainer tree attention."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from engine.models.config import ModelConfig, TextConfig
from engine.models.linear import Linear
from engine.models.vision import VisionFeatures, VisionInput, VisionTower
from kernels import add_rmsnorm, linear, linear_logprob_entropy, rmsnorm, rotary, swiglu

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, Hq, D], k [T, Hk, D], v [T, Hk, D]) -> [T, Hq, D]; masking, scale and caching are its own matter."""


Fused = tuple[Tensor, Tensor | None]
"""(weight, bias) of several projections as one, over storage in which theirs lie one behind the other."""


FusedLayer = tuple[list[Tensor], tuple[Tensor | None, Tensor | None], float]
"""(weights, (qkv bias, o bias), eps) of a decoder layer, as `kernels.decoder_layer` takes them."""


@dataclass(frozen=True, slots=True)
class Predict:
    """Which log-probs to return: row `index[n]` of the hidden states predicts token `labels[n]`. Both [N] int64."""

    index: Tensor
    labels: Tensor
    temperature: float = 1.0


class Qwen3VL(nn.Module):
    """Parameter names are Hugging Face's, so state dicts go in and out unchanged."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, H], the LM head; the embedding itself when the two are tied."""
        return self.model.language_model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention: Attention,
        vision: VisionInput | None = None,
        predict: Predict | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """input_ids [T], position_ids [3, T] int64 -> hidden [T, H]; with `predict` (logprob [N], entropy [N]) fp32.

        The LM head runs in here, so that a sharded trainer uses it while it is gathered.
        """
        hidden = self.model(input_ids, position_ids, attention, vision)
        if predict is None:
            return hidden
        # Several tokens may be predicted from one row. The backward pass of indexing adds them up in an order that
        # depends on the threads on the CPU, that of index_select on CUDA.
        rows = hidden.index_select(0, predict.index) if hidden.device.type == "cpu" else hidden[predict.index]
        return linear_logprob_entropy(rows, self.head_weight, predict.labels, predict.temperature)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> logits [N, V] in fp32."""
        return linear(hidden, self.head_weight, wide=True)


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.language_model = LanguageModel(config.text)
        if config.vision is not None:
            self.visual = VisionTower(config.vision)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention: Attention, vision: VisionInput | None
    ) -> Tensor:
        features, index = None, None
        if vision is not None:
            features, index = vision.features, vision.token_index
            if features is None:
                features = self.visual(vision.pixel_values, vision.grid_thw)
        return self.language_model(input_ids, position_ids, attention, features, index)


class LanguageModel(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention: Attention,
        features: VisionFeatures | None,
        image_index: Tensor | None,
    ) -> Tensor:
        x = self.embed_tokens(input_ids)
        if features is not None:
            x = x.index_copy(0, image_index, features.embeds.to(x.dtype))
        cos, sin = mrope(position_ids, self.config)
        residual = torch.zeros_like(x)
        for index, layer in enumerate(self.layers):
            x, residual = layer(x, residual, cos, sin, attention)
            if features is not None and index < len(features.deepstack):
                x = x.index_add(0, image_index, features.deepstack[index].to(x.dtype))
        return self.norm.add(x, residual)[0]


def mrope(position_ids: Tensor, config: TextConfig) -> tuple[Tensor, Tensor]:
    """Interleaved multimodal rotary angles: position_ids [3, T] (time, height, width) -> cos, sin [T, D / 2] in fp32.

    Of the frequencies, numbers 1, 4, 7, … take the height and 2, 5, 8, … the width, as far as `mrope_section` reaches;
    all others take the time.
    """
    axis, frequencies = mrope_table(config, position_ids.device)
    angles = position_ids.float()[axis].T * frequencies  # laid out as [D / 2, T], which every layer would copy
    return angles.cos().contiguous(), angles.sin().contiguous()


@cache
def mrope_table(config: TextConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """The axis (0 time, 1 height, 2 width) of each rotary frequency, and the frequency: both [D / 2]."""
    with torch.inference_mode(False):  # also training reads them
        number = torch.arange(config.head_dim // 2, device=device)
        height = (number % 3 == 1) & (number < 3 * config.mrope_section[1])
        width = (number % 3 == 2) & (number < 3 * config.mrope_section[2])
        return height.long() + 2 * width.long(), config.rope_theta ** (-number.float() / (config.head_dim // 2))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual) in one pass."""
        return add_rmsnorm(x, residual, self.weight, self.eps)


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, index: int):
        super().__init__()
        self.self_attn = SelfAttention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.index = index
        self.fused: FusedLayer | None = None

    def forward(
        self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, attention: Attention
    ) -> tuple[Tensor, Tensor]:
        """The layer's input is x + residual, and so is its output: the sum is formed inside the next norm."""
        if self.fused is not None and getattr(attention, "whole_layers", False):
            return attention.layer(self.index, x, residual, cos, sin, *self.fused)  # type: ignore[attr-defined]
        x, residual = self.input_layernorm.add(x, residual)
        x, residual = self.post_attention_layernorm.add(self.self_attn(x, cos, sin, attention), residual)
        return self.mlp(x), residual


class SelfAttention(nn.Module):
    def __init__(self, config: TextConfig, index: int):
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        bias = config.attention_bias
        self.q_proj = Linear(config.hidden_size, config.num_heads * config.head_dim, bias=bias)
        self.k_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=bias)
        self.v_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=bias)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.fused: Fused | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        tokens = x.shape[0]
        if self.fused is None:
            q, k, v = (proj(x).view(tokens, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        else:
            q, k, v = linear(x, *self.fused).view(tokens, -1, self.head_dim).split(self.heads, dim=1)
        q, k = rotary(self.q_norm(q), self.k_norm(k), cos, sin)
        return self.o_proj(attention(self.index, q, k, v).reshape(tokens, -1))


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

        self.fused: Fused | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = linear(x, *self.fused).chunk(2, dim=1)
        return self.down_proj(swiglu(gate, up))

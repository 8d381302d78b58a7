"""Our paged attention: prefill, extend and decode of a whole batch are two calls a layer, write and attend."""

from dataclasses import dataclass

from torch import Tensor

from engine.memory import KVCache
from kernels import PagedPlan, decoder_layer, paged_attention, write_kv


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """Attention of one step, for `Qwen3VL.forward`.

    block_tables [S, max_blocks] int32, cu_seqlens_q [S + 1] int32, context_lens [S] int32 (tokens that the last query
    sees), slot_mapping [W] int64 (where new K and V go: block * block_size + offset), writes: the W packed rows that
    are new, or None when all are (a fork's first query re-reads a token whose KV it shares). plan: what is read
    together, for all layers. whole_layers: `layer` may be called.
    """

    kv: KVCache
    block_tables: Tensor
    cu_seqlens_q: Tensor
    context_lens: Tensor
    slot_mapping: Tensor
    writes: Tensor | None
    scale: float
    plan: PagedPlan
    whole_layers: bool

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_cache, v_cache = self.kv.layer(layer)
        if self.writes is not None:
            k, v = k[self.writes], v[self.writes]
        write_kv(k, v, k_cache, v_cache, self.slot_mapping)
        tables, starts, lengths = self.block_tables, self.cu_seqlens_q, self.context_lens
        return paged_attention(q, k_cache, v_cache, tables, starts, lengths, self.scale, self.plan)

    def layer(
        self,
        index: int,
        x: Tensor,
        residual: Tensor,
        cos: Tensor,
        sin: Tensor,
        weights: list[Tensor],
        biases: tuple[Tensor | None, Tensor | None],
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Decoder layer `index` in one call; see `kernels.decoder_layer`."""
        return decoder_layer(
            x,
            residual,
            cos,
            sin,
            weights,
            *biases,
            *self.kv.layer(index),
            self.slot_mapping,
            self.writes,
            self.block_tables,
            self.cu_seqlens_q,
            self.context_lens,
            eps,
            self.scale,
            self.plan.share,
        )

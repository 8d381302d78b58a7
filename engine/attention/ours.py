"""Our paged attention: prefill, extend and decode of a whole batch are two calls a layer, write and attend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from engine.attention.backend import Backend, StepAttention, Target
from engine.memory import KVCache
from kernels import PagedPlan, can_run_layers, decoder_layer, paged_attention, paged_plan
from kernels.paged_attention import why_not_compiled

if TYPE_CHECKING:
    from engine.runner import Packed


class Ours(Backend):
    """`whole_layers`: a decoder layer is one call into C++."""

    name = "ours"
    about = "kernels.paged_attention: Triton on CUDA, C++ on the CPU; reads what sequences share once"

    def __init__(self, kv: KVCache, target: Target, share_prefixes: bool):
        super().__init__(kv, target, share_prefixes)
        self.whole_layers = can_run_layers(kv.layer(0)[0])

    @classmethod
    def why_not(cls, target: Target) -> str | None:
        return why_not_compiled(target.device, target.dtype, target.group, target.head_dim, target.block_size)

    def step(self, packed: Packed) -> OursStep:
        tables, starts, lengths = packed.tables, packed.cu_seqlens, packed.context_lens
        plan = paged_plan(tables, starts, lengths, self.target.num_heads, self.kv.layer(0)[0], self.share_prefixes)
        return OursStep(
            self.kv,
            self.tensor(tables),
            self.tensor(starts),
            self.tensor(lengths),
            self.tensor(packed.slots),
            self.writes(packed),
            self.scale,
            plan,
            self.whole_layers,
        )


class OursStep(StepAttention):
    """block_tables [S, max_blocks], cu_seqlens_q [S + 1], context_lens [S] (what the last query sees), all int32.
    plan: what is read together, for all layers. whole_layers: `layer` may be called.
    """

    def __init__(
        self,
        kv: KVCache,
        block_tables: Tensor,
        cu_seqlens_q: Tensor,
        context_lens: Tensor,
        slots: Tensor,
        writes: Tensor | None,
        scale: float,
        plan: PagedPlan,
        whole_layers: bool,
    ):
        super().__init__(kv, slots, writes)
        self.block_tables, self.cu_seqlens_q, self.context_lens = block_tables, cu_seqlens_q, context_lens
        self.scale, self.plan, self.whole_layers = scale, plan, whole_layers

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
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
            self.slots,
            self.writes,
            self.block_tables,
            self.cu_seqlens_q,
            self.context_lens,
            eps,
            self.scale,
            self.plan.share,
        )

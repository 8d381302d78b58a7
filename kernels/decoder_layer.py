"""A whole decoder layer over the paged cache in one call to C++, for inference on the CPU."""

import torch

from kernels._library import FP32_BF16, LOADED, MODE, use_cpp


def can_run_layers(k_cache: torch.Tensor) -> bool:
    """Whether `decoder_layer` serves this cache, [num_blocks, Hk, block_size, D]."""
    _, _, block_size, dim = k_cache.shape
    return (
        MODE in ("auto", "cpp")
        and use_cpp(k_cache, dtypes=FP32_BF16)
        and dim % 8 == 0
        and dim <= 256
        and block_size % 8 == 0
    )


def decoder_layer(
    x: torch.Tensor,
    residual: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weights: list[torch.Tensor],
    qkv_bias: torch.Tensor | None,
    o_bias: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    writes: torch.Tensor | None,
    tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    eps: float,
    scale: float,
    share: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, residual) of a Qwen3 layer whose input is x + residual: the operators of this package, in one call.

    x, residual: [T, H]; cos, sin: [T, D/2]; weights: input norm [H], q, k and v as one [(Hq + 2 Hk) D, H], q norm [D],
    k norm [D], o [H, Hq D], post-attention norm [H], gate and up as one [2 I, H], down [H, I]. Caches, slots, tables
    and lengths as in `write_kv` and `paged_attention`; writes: the rows whose KV is stored, or None for all;
    share: whether sequences read common blocks together.
    All of one dtype but cos and sin, which are fp32: fp32 or bf16, on the CPU. The result is bit for bit that of the
    single operators; there is no gradient.
    """
    return torch.ops.axpo.decoder_layer.default(
        x,
        residual,
        cos,
        sin,
        weights,
        qkv_bias,
        o_bias,
        k_cache,
        v_cache,
        slots,
        writes,
        tables,
        cu_seqlens_q,
        context_lens,
        eps,
        scale,
        share,
    )


if LOADED:

    @torch.library.register_fake("axpo::decoder_layer")
    def _(x, residual, *_):
        return x.new_empty(x.shape), x.new_empty(x.shape)

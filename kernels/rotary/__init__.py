"""Rotary position embedding of queries and keys in one call; differentiable."""

import torch

from kernels._library import FP32_BF16, LOADED, choose, one_narrow_dtype
from kernels.rotary.reference import rotary_reference

__all__ = ["rotary", "rotary_reference"]


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the pairs (x[i], x[i + D/2]) of every head by the token's angles (arXiv:2104.09864).

    q: [T, Hq, D], k: [T, Hk, D]; head views of a fused projection are read in place. cos, sin: [T, D/2], constants:
    for multimodal positions, of the angles that are interleaved already. Returns contiguous (q', k').
    Raises ValueError for shapes that do not fit, and for a backend that cannot serve them.
    """
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 3 or cos.shape != sin.shape or 2 * cos.shape[-1] != x.shape[2] or cos.shape[:-1] != x.shape[:1]:
            raise ValueError(
                f"rotary: {name} has shape {list(x.shape)} with cos {list(cos.shape)} and sin {list(sin.shape)}: "
                "they must be [T, heads, D], [T, D/2] and [T, D/2]"
            )
    fits = max(q.shape[1], k.shape[1]) * q.shape[2] <= 32768  # the heads of a token, in registers
    narrow = fits and one_narrow_dtype(q, k) and one_narrow_dtype(cos, sin)
    wide = cos.dtype == sin.dtype == torch.float32
    chosen = choose(
        "rotary", backend, q, k, cos, sin, cpp=q.dtype == k.dtype and wide, triton=narrow, cpp_dtypes=FP32_BF16
    )
    if chosen == "cpp":
        return torch.ops.axpo.rotary.default(q, k, cos, sin)
    if chosen == "triton":
        from kernels.rotary import triton

        return triton.rotary(q, k, cos, sin)
    return rotary_reference(q, k, cos, sin)


if LOADED:

    @torch.library.register_fake("axpo::rotary")
    def _(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape)

"""Rotary position embedding of queries and keys in one call; differentiable."""

import torch

from kernels._library import LOADED, use_cpp


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the pairs (x[i], x[i + D/2]) of every head by the token's angles.

    q: [T, Hq, D], k: [T, Hk, D]; head views of a fused projection are read in place. cos, sin: [T, D/2], constants.
    Returns contiguous (q', k').
    """
    if use_cpp(q, k, cos, sin):
        return torch.ops.axpo.rotary.default(q, k, cos, sin)
    return rotary_reference(q, k, cos, sin)


def rotary_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """rotary in plain torch, for any device; computed in the wider of the dtypes, returned in q's and k's."""
    c, s = cos[:, None], sin[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


if LOADED:

    @torch.library.register_fake("axpo::rotary")
    def _(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape)

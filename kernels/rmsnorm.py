"""RMSNorm, alone and fused with the residual addition before it; differentiable."""

import torch

from kernels._library import LOADED, use_cpp


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight · x / sqrt(mean(x²) + eps) over the last dimension, with fp32 statistics.

    x: [..., H]; the leading dimensions may be strided. weight: [H]. Returns [..., H] in x's dtype.
    """
    if use_cpp(x, weight):
        return torch.ops.axpo.rmsnorm.default(x, weight, eps)
    return rmsnorm_reference(x, weight, eps)


def add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rmsnorm(x + residual), x + residual) in one pass. x, residual: [..., H]; weight: [H]."""
    if use_cpp(x, residual, weight):
        return torch.ops.axpo.add_rmsnorm.default(x, residual, weight, eps)
    return add_rmsnorm_reference(x, residual, weight, eps)


def rmsnorm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """rmsnorm in plain torch, for any dtype and device: normalised in fp32 or better, then cast, then scaled."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rmsnorm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """add_rmsnorm in plain torch, for any dtype and device."""
    total = x + residual
    return rmsnorm_reference(total, weight, eps), total


if LOADED:

    @torch.library.register_fake("axpo::rmsnorm")
    def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("axpo::add_rmsnorm")
    def _(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_empty(x.shape), x.new_empty(x.shape)

    @torch.library.register_fake("axpo::rmsnorm_backward")
    def _(
        grad: torch.Tensor, grad_sum: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_empty(x.shape), weight.new_empty(weight.shape)

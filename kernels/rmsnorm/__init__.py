"""RMSNorm, alone and fused with the residual addition before it; differentiable."""

import torch

from kernels._library import FP32_BF16, LOADED, choose, one_narrow_dtype
from kernels.rmsnorm.reference import add_rmsnorm_reference, rmsnorm_reference

__all__ = ["add_rmsnorm", "add_rmsnorm_reference", "rmsnorm", "rmsnorm_reference"]


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str | None = None) -> torch.Tensor:
    """weight · x / sqrt(mean(x²) + eps) over the last dimension, with fp32 statistics (arXiv:1910.07467).

    x: [..., H]; the leading dimensions may be strided. weight: [H]. Returns [..., H] in x's dtype.
    Raises ValueError for shapes that do not fit, and for a backend that cannot serve them.
    """
    _check("rmsnorm", x, weight)
    chosen = choose(
        "rmsnorm",
        backend,
        x,
        weight,
        cpp=one_narrow_dtype(x, weight),
        triton=_in_triton(x, weight),
        cpp_dtypes=FP32_BF16,
    )
    if chosen == "cpp":
        return torch.ops.axpo.rmsnorm.default(x, weight, eps)
    if chosen == "triton":
        from kernels.rmsnorm import triton

        return triton.rmsnorm(x, weight, eps)
    return rmsnorm_reference(x, weight, eps)


def add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rmsnorm(x + residual), x + residual) in one pass. x, residual: [..., H]; weight: [H]. Raises as rmsnorm."""
    _check("add_rmsnorm", x, weight)
    if x.shape != residual.shape:
        raise ValueError(
            f"add_rmsnorm: residual has shape {list(residual.shape)}, but x has {list(x.shape)}: they must agree"
        )
    chosen = choose(
        "add_rmsnorm",
        backend,
        x,
        residual,
        weight,
        cpp=one_narrow_dtype(x, residual, weight),
        triton=_in_triton(x, residual, weight),
        cpp_dtypes=FP32_BF16,
    )
    if chosen == "cpp":
        return torch.ops.axpo.add_rmsnorm.default(x, residual, weight, eps)
    if chosen == "triton":
        from kernels.rmsnorm import triton

        return triton.add_rmsnorm(x, residual, weight, eps)
    return add_rmsnorm_reference(x, residual, weight, eps)


def _check(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: weight has shape {list(weight.shape)}, but the last dimension of x {list(x.shape)} needs one "
            "entry each"
        )


def _in_triton(*tensors: torch.Tensor) -> bool:
    """Whether a row fits into registers, in a dtype that the kernels know."""
    return tensors[0].shape[-1] <= 16384 and one_narrow_dtype(*tensors)


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

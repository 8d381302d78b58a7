"""Matrix product with a weight as checkpoints store it, [N, K]: few rows on a CPU at the speed of memory."""

import torch

from kernels._library import FP32_BF16, LOADED, choose
from kernels.linear.reference import linear_reference

__all__ = ["linear", "linear_reference"]


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    wide: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias, added up in fp32 or better.

    x: [..., K]; weight: [N, K]; bias: [N] or None, all of one dtype. Returns [..., N] in that dtype, or rounded to fp32
    instead when `wide` (fp64 stays fp64), which is what logits need.
    backend: "cpp" (fp32 or bf16 on the CPU, where no gradient is needed) or "reference" (torch's own product: what a
    gradient goes through, and on CUDA cuBLAS, so there is no Triton form); default: the best that can serve the call.

    In C++ a result depends on its row of x and on the weight alone, bit for bit: not on the other rows, the number of
    threads or the processor's vectors. Raises ValueError for shapes that disagree.
    """
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: x {list(x.shape)} and weight {list(weight.shape)} must be [..., K] and [N, K]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear: bias {list(bias.shape)} needs one entry for each of the {len(weight)} rows of weight"
        )
    differentiates = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    fits = not differentiates and x.dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype)
    chosen = choose("linear", backend, x, weight, bias, cpp=fits, triton=False, cpp_dtypes=FP32_BF16)
    if chosen == "cpp":
        return torch.ops.axpo.linear.default(x, weight, bias, wide)
    return linear_reference(x, weight, bias, wide)


if LOADED:

    @torch.library.register_fake("axpo::linear")
    def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, wide: bool = False) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], len(weight)), dtype=torch.float32 if wide else x.dtype)

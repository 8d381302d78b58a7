"""Matrix product with a weight [N, K] in plain torch, on any device; differentiable."""

import torch
import torch.nn.functional as F


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, wide: bool = False
) -> torch.Tensor:
    """linear by the BLAS library at hand: its bits may depend on the number of rows."""
    if not wide or weight.dtype == torch.float64:
        return F.linear(x, weight, bias)
    if x.is_cuda and x.dtype != torch.float32 and bias is None and not torch.is_grad_enabled():
        rows = torch.mm(x.reshape(-1, x.shape[-1]), weight.T, out_dtype=torch.float32)  # the weight is not copied
        return rows.view(*x.shape[:-1], len(weight))
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())

"""SwiGLU, the gated activation of the language model's feed-forward layers; differentiable."""

import torch

from kernels._library import FP32_BF16, LOADED, choose, one_narrow_dtype
from kernels.swiglu.reference import swiglu_reference

__all__ = ["swiglu", "swiglu_reference"]


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """silu(gate) · up (arXiv:2002.05202). gate, up: [..., I]; the halves of one fused projection are read in place.

    Returns [..., I]. Raises ValueError for shapes that do not fit, and for a backend that cannot serve them.
    """
    if gate.dim() < 1 or gate.shape != up.shape:
        raise ValueError(f"swiglu: gate has shape {list(gate.shape)}, but up has {list(up.shape)}: they must agree")
    same = one_narrow_dtype(gate, up)
    chosen = choose("swiglu", backend, gate, up, cpp=same, triton=same, cpp_dtypes=FP32_BF16)
    if chosen == "cpp":
        return torch.ops.axpo.swiglu.default(gate, up)
    if chosen == "triton":
        from kernels.swiglu import triton

        return triton.swiglu(gate, up)
    return swiglu_reference(gate, up)


if LOADED:

    @torch.library.register_fake("axpo::swiglu")
    def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gate.new_empty(gate.shape)

    @torch.library.register_fake("axpo::swiglu_backward")
    def _(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gate.new_empty(gate.shape), gate.new_empty(gate.shape)

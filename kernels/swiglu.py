"""SwiGLU, the gated activation of the language model's feed-forward layers; differentiable."""

import torch

from kernels._library import LOADED, use_cpp


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up. gate, up: [T, I]; the two halves of one fused projection are read in place. Returns [T, I]."""
    if use_cpp(gate, up):
        return torch.ops.axpo.swiglu.default(gate, up)
    return swiglu_reference(gate, up)


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """swiglu in plain torch, for any dtype and device."""
    return torch.nn.functional.silu(gate) * up


if LOADED:

    @torch.library.register_fake("axpo::swiglu")
    def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gate.new_empty(gate.shape)

    @torch.library.register_fake("axpo::swiglu_backward")
    def _(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gate.new_empty(gate.shape), gate.new_empty(gate.shape)

"""SwiGLU in plain torch, for any dtype and device."""

import torch


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, rounded to the dtype in between."""
    return torch.nn.functional.silu(gate) * up

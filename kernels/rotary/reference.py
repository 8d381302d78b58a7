"""Rotary position embedding in plain torch, for any dtype and device."""

import torch


def rotary_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """rotary: computed in the wider of the dtypes, returned in q's and k's."""
    c, s = cos[:, None], sin[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)

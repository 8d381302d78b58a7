"""linear_logprob_entropy in plain torch: log_softmax over all of [N, V]."""

import torch

from kernels.linear_logprob_entropy.state import IGNORE_INDEX, accumulator


def linear_logprob_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[torch.Tensor, torch.Tensor]:
    """linear_logprob_entropy by log_softmax over all of [N, V]; any dtype (fp64 stays fp64), any device."""
    dtype = accumulator(hidden)
    scale = temperature.to(dtype)[:, None] if isinstance(temperature, torch.Tensor) else temperature
    logp = torch.log_softmax(hidden.to(dtype) @ weight.to(dtype).T / scale, dim=-1)
    valid = labels != ignore_index
    logprob = logp.gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return torch.where(valid, logprob, 0.0), torch.where(valid, entropy, 0.0)

"""What every form of linear_logprob_entropy shares: argument checks, and the algebra of a row's running state.

A state [N, 4] fp64 holds, over the columns seen so far and with z = logit / temperature: the largest z, Σ e^{z−max},
the centred Σ e^{z−max} (z−max), and the label's z (−inf where the label is not among the columns). Centring keeps the
entropy exact under any common offset of the logits, and fp64 keeps the digits of a sum just above 1, whose logarithm is
the log-probability of an almost certain label.
"""

import torch

IGNORE_INDEX = -100


def accumulator(x: torch.Tensor) -> torch.dtype:
    """The dtype of logits and results: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def check(
    op: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float | torch.Tensor
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"{op}: hidden {list(hidden.shape)}, weight {list(weight.shape)} and labels "
            f"{list(labels.shape)} must be [N, H], [V, H] and [N]"
        )
    if not isinstance(temperature, torch.Tensor) and not temperature > 0:
        raise ValueError(f"{op}: temperature is {temperature}: it must be above 0")


def temperature_of_rows(temperature: float | torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """[N] contiguous, in the accumulator's dtype."""
    if not isinstance(temperature, torch.Tensor):  # made on the device, and not sent to it, which would wait
        return torch.full(hidden.shape[:1], temperature, dtype=accumulator(hidden), device=hidden.device)
    return temperature.to(hidden.device, accumulator(hidden)).expand(hidden.shape[0]).contiguous()


def merge_states(states: torch.Tensor) -> torch.Tensor:
    """[R, N, 4] states over disjoint columns -> [N, 4] over all. One without columns is (−inf, 0, 0, −inf)."""
    maximum, total, centred, at_label = states.unbind(-1)
    new = maximum.amax(0)
    # A finite stand-in for −inf, as −inf − −inf and 0 · −inf are NaN; e^−10000 is 0 in fp64.
    shift = torch.where(maximum == -torch.inf, -1e4, maximum - new).clamp(min=-1e4)
    scale = shift.exp()
    merged = (new, (scale * total).sum(0), (scale * (centred + total * shift)).sum(0), at_label.amax(0))
    return torch.stack(merged, dim=-1)


def results(
    state: torch.Tensor, labels: torch.Tensor, ignore_index: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob, entropy, max, log_sum), each [N]: logsumexp is max + log_sum, kept apart to lose no digits."""
    maximum, total, centred, at_label = state.unbind(-1)
    log_sum = total.log()
    valid = labels != ignore_index
    logprob = torch.where(valid, at_label - maximum - log_sum, 0.0)
    entropy = torch.where(valid, log_sum - centred / total, 0.0)
    return logprob.to(dtype), entropy.to(dtype), maximum.to(dtype, copy=True), log_sum.to(dtype)

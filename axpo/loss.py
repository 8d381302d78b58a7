"""The policy loss over a flat row of trained tokens, and the numbers that describe an update (PAPER.md, "GRPO")."""

import torch
from torch import Tensor

# exp() of a larger log-ratio overflows fp32 and turns a clipped token's zero gradient into NaN.
_MAX_LOG_RATIO = 20.0


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
) -> Tensor:
    """Weighted sum over tokens of −[min(ρÂ, clip(ρ, 1−ε_low, 1+ε_high)Â) − β·KL]; the caller divides by Σ weights.

    All tensors [M] fp32; only `logprobs` carries a gradient. ρ = exp(logprobs − old_logprobs).
    Weights decide the aggregation: 1 a token gives the token mean, 1 / (its trajectory's trained tokens) the sequence
    mean; the denominator is the sum of the weights over all micro-batches and ranks of the step.
    """
    ratio = log_ratio(logprobs, old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    if kl_coef and ref_logprobs is not None:
        losses = losses + kl_coef * kl_divergence(logprobs, ref_logprobs)
    return (losses * weights).sum()


def log_ratio(logprobs: Tensor, other: Tensor) -> Tensor:
    return (logprobs - other).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(π_θ ‖ π_ref) at each sampled token, [M]: exp(d) − d − 1 with d = log π_ref − log π_θ.

    The "k3" of Schulman, "Approximating KL divergence" (2020): unbiased, and never negative.
    """
    d = log_ratio(ref_logprobs, logprobs)
    return d.exp() - d - 1


def policy_metrics(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, entropies: Tensor, clip_low: float, clip_high: float
) -> dict[str, float]:
    """What an update sees over its trained tokens, [M] each; clip fractions count the tokens whose gradient stops."""
    ratio = log_ratio(logprobs, old_logprobs).exp()
    return {
        "policy/ratio_max": ratio.max().item(),
        "policy/clip_low_fraction": ((ratio < 1 - clip_low) & (advantages < 0)).double().mean().item(),
        "policy/clip_high_fraction": ((ratio > 1 + clip_high) & (advantages > 0)).double().mean().item(),
        "policy/entropy": entropies.double().mean().item(),
        "policy/trained_tokens": float(ratio.numel()),
    }


def mismatch_metrics(logprobs: Tensor, old_logprobs: Tensor) -> dict[str, float]:
    """How far the trainer's log-probs are from the engine's on the same tokens and weights, [M] each.

    The mean hides the tail that hurts, so the 95th percentile, the maximum and the ratios outside
    0.9–1.1 are there too.
    """
    difference = (logprobs - old_logprobs).double().abs()
    ratio = log_ratio(logprobs, old_logprobs).exp()
    rank = max(0, -(-difference.numel() * 95 // 100) - 1)
    return {
        "mismatch/logprob_diff_mean": difference.mean().item(),
        "mismatch/logprob_diff_p95": difference.sort().values[rank].item(),
        "mismatch/logprob_diff_max": difference.max().item(),
        "mismatch/ratio_outside_fraction": ((ratio < 0.9) | (ratio > 1.1)).double().mean().item(),
    }

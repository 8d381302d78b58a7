"""The policy losses over a flat row of trained tokens, and the numbers that describe an update.

Which formula is which published objective: docs/objectives.md.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from axpo.config import Loss

# exp() of a log-ratio above 88 overflows fp32, which turns a clipped token's zero gradient into NaN.
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """The trained tokens of a packed row, [M] each, fp32; only `logprobs` and `entropies` carry gradients.

    old_logprobs: of the policy π_old that the ratio is taken against. sampler_logprobs: the engine's, as sampled; the
    two are the same unless π_old was scored by the trainer. weights: the aggregation; the caller divides the loss by
    the step's denominator. sequence: int64, the trajectory that trains the token (axpo.tree.PackedBatch).
    """

    logprobs: Tensor
    entropies: Tensor
    old_logprobs: Tensor
    sampler_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    sequence: Tensor
    ref_logprobs: Tensor | None = None

    def detach(self) -> "Tokens":
        return replace(self, logprobs=self.logprobs.detach(), entropies=self.entropies.detach())


def policy_loss(tokens: Tokens, loss: "Loss") -> Tensor:
    """Weighted sum over tokens of −w·(surrogate) + β·KL − c·entropy; w = 1 without importance correction."""
    ratio = policy_ratio(tokens, loss)
    if loss.objective == "cispo":
        losses = cispo(tokens.logprobs, ratio, tokens.advantages, loss.clip_low, loss.clip_high)
    else:
        losses = clipped_surrogate(ratio, tokens.advantages, loss.clip_low, loss.clip_high)
    if loss.tis != "off":
        losses = losses * importance_weights(tokens, loss)
    if loss.kl_coef and tokens.ref_logprobs is not None:
        losses = losses + loss.kl_coef * kl_divergence(tokens.logprobs, tokens.ref_logprobs, loss.kl_estimator)
    if loss.entropy_coef:
        losses = losses - loss.entropy_coef * tokens.entropies
    return (losses * tokens.weights).sum()


def policy_ratio(tokens: Tokens, loss: "Loss") -> Tensor:
    """ρ of every token, [M]: its own π_θ/π_old, or under gspo its sequence's."""
    if loss.objective == "gspo":
        return sequence_ratio(tokens.logprobs, tokens.old_logprobs, tokens.sequence)
    return log_ratio(tokens.logprobs, tokens.old_logprobs).exp()


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """−min(ρÂ, clip(ρ, 1−ε_low, 1+ε_high)Â): PPO (Schulman et al., 2017), as GRPO uses it (Shao et al., 2024).

    Two different ε are DAPO's "clip-higher" (Yu et al., 2025).
    """
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, sequence: Tensor) -> Tensor:
    """GSPO (Zheng et al., 2025): s = exp(mean of the sequence's token log-ratios), the geometric mean of its ratios.

    The value is the same on each of the sequence's tokens; the gradient is the paper's GSPO-token form,
    sg[s]·π_θ(t)/sg[π_θ(t)], whose mean over the sequence is ∇s exactly, and which allows an advantage a token.
    A sequence is what one trajectory trains: under AXPO a source's kept prefix, and a continuation without it, since to
    the continuation the prefix was given.
    """
    mean = _sequence_sums(log_ratio(logprobs, old_logprobs).detach(), sequence) / _sequence_sums(
        torch.ones_like(old_logprobs), sequence
    )
    return mean.exp()[sequence] * (logprobs - logprobs.detach()).exp()


def cispo(logprobs: Tensor, ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """−sg[clip(ρ, 1−ε_low, 1+ε_high)]·Â·log π_θ: CISPO (MiniMax-M1, 2025). The weight is capped, no gradient stops."""
    return -ratio.clamp(1 - clip_low, 1 + clip_high).detach() * advantages * logprobs


def importance_weights(tokens: Tokens, loss: "Loss") -> Tensor:
    """What engine and trainer disagree on, as a constant weight on each token's surrogate, [M]: π_old/π_sampler.

    truncate: min(w, C) (TIS; Yao et al., "Your efficient RL framework secretly brings you off-policy RL training",
    2025). mask: w where 1/C <= w <= C, else 0, so that the token is left out (the rule of IcePop, 2025).
    sequence: w is the product over the sequence's trained tokens instead of the token's own.
    """
    difference = log_ratio(tokens.old_logprobs.detach(), tokens.sampler_logprobs)
    level, _, rule = loss.tis.partition("_")
    if level == "sequence":
        total = _sequence_sums(difference, tokens.sequence).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        difference = total[tokens.sequence]
    weights = difference.exp()
    if rule == "truncate":
        return weights.clamp(max=loss.tis_cap)
    return weights.where((weights >= 1 / loss.tis_cap) & (weights <= loss.tis_cap), 0.0)


def log_ratio(logprobs: Tensor, other: Tensor) -> Tensor:
    return (logprobs - other).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate of KL(π_θ ‖ π_ref) at each sampled token, [M] (Schulman, "Approximating KL divergence", 2020).

    With d = log π_ref − log π_θ: k1 = −d (unbiased, of either sign), k2 = d²/2 (biased, least variance),
    k3 = exp(d) − d − 1 (unbiased, never negative). k1's own gradient would not depend on π_ref at all; in its place
    stands k2's, −d·∇log π_θ, which on policy is the gradient of the KL itself.
    """
    if estimator == "k3":
        d = (ref_logprobs - logprobs).clamp(max=_MAX_LOG_RATIO)  # only there exp() grows; below, d alone pulls back
        return d.exp() - d - 1
    d = ref_logprobs - logprobs
    k2 = d.square() / 2
    return k2 if estimator == "k2" else k2 + (-d - k2).detach()


def _sequence_sums(values: Tensor, sequence: Tensor) -> Tensor:
    return values.new_zeros(int(sequence.max()) + 1).index_add(0, sequence, values)


def metric_columns(tokens: Tokens, loss: "Loss") -> Tensor:
    """[7, M] of the tokens that count: log-probs of policy, sampler, reference; ratio, advantage, entropy, w."""
    counted = tokens.weights > 0
    reference = torch.zeros_like(tokens.logprobs) if tokens.ref_logprobs is None else tokens.ref_logprobs
    weights = torch.ones_like(tokens.logprobs) if loss.tis == "off" else importance_weights(tokens, loss)
    columns = tokens.logprobs, tokens.sampler_logprobs, reference, policy_ratio(tokens, loss), tokens.advantages
    return torch.stack([*columns, tokens.entropies, weights])[:, counted]


def update_metrics(columns: Tensor, loss: "Loss") -> dict[str, float]:
    """What the step's updates saw over their trained tokens, from `metric_columns` [7, M].

    Clip fractions count the tokens whose gradient stops; under cispo those whose weight is capped.
    """
    logprobs, _, reference, ratio, advantages, entropies, weights = columns
    stops = loss.objective != "cispo"
    low, high = ratio < 1 - loss.clip_low, ratio > 1 + loss.clip_high
    metrics = {
        "policy/ratio_max": ratio.max().item(),
        "policy/clip_low_fraction": (low & (advantages < 0) if stops else low).double().mean().item(),
        "policy/clip_high_fraction": (high & (advantages > 0) if stops else high).double().mean().item(),
        "policy/entropy": entropies.double().mean().item(),
        "policy/trained_tokens": float(ratio.numel()),
    }
    if loss.kl_coef:
        metrics["policy/kl"] = kl_divergence(logprobs, reference, loss.kl_estimator).double().mean().item()
    if loss.tis != "off":
        changed = (weights >= loss.tis_cap) if loss.tis.endswith("truncate") else weights == 0
        metrics["mismatch/tis_weight_mean"] = weights.double().mean().item()
        metrics["mismatch/tis_limited_fraction"] = changed.double().mean().item()
    return metrics


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

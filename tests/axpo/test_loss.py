"""Every objective against its formula token by token in fp64, its gradient included, and the metrics of an update."""

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from axpo.config import Loss
from axpo.loss import (
    Tokens,
    cispo,
    clipped_surrogate,
    importance_weights,
    kl_divergence,
    metric_columns,
    mismatch_metrics,
    policy_loss,
    policy_ratio,
    update_metrics,
)

SEQUENCES = 9


def tokens(seed: int, count: int = 400) -> Tokens:
    """Ratios on both sides of both clips, sequences of different lengths that are not contiguous."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(count, generator=generator)

    old = -torch.rand(count, generator=generator) * 3
    return Tokens(
        logprobs=(old + noise() * 0.4).requires_grad_(),
        entropies=noise().abs().requires_grad_(),
        old_logprobs=old,
        sampler_logprobs=old + 0.3 * noise(),
        advantages=noise(),
        weights=torch.rand(count, generator=generator),
        sequence=torch.cat(
            [torch.arange(SEQUENCES), torch.randint(SEQUENCES, (count - SEQUENCES,), generator=generator)]
        ),
        ref_logprobs=old + 0.1 * noise(),
    )


def plain(t: Tokens) -> list[dict[str, float]]:
    """The tokens as dicts of Python floats."""
    names = [name for name in t.__slots__ if name != "sequence"]
    columns = [getattr(t, name).detach().double().tolist() for name in names]
    columns.append(t.sequence.tolist())
    return [dict(zip([*names, "sequence"], values, strict=True)) for values in zip(*columns, strict=True)]


def by_sequence(rows: list[dict[str, float]]) -> dict[float, list[dict[str, float]]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["sequence"]].append(row)
    return groups


def expected(rows: list[dict[str, float]], loss: Loss) -> tuple[float, list[float], list[float]]:
    """Loss, d/d logprob and d/d entropy of each token, from the papers' formulas and their derivatives by hand."""
    groups = by_sequence(rows)
    total, slopes, entropy_slopes = 0.0, [], []
    for row in rows:
        lp, a = row["logprobs"], row["advantages"]
        mine = groups[row["sequence"]]
        ratio = math.exp(lp - row["old_logprobs"])
        if loss.objective == "gspo":
            ratio = math.exp(sum(r["logprobs"] - r["old_logprobs"] for r in mine) / len(mine))
        clipped = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
        if loss.objective == "cispo":
            surrogate, slope = clipped * a * lp, clipped * a
        else:
            surrogate = min(ratio * a, clipped * a)
            slope = ratio * a if ratio * a <= clipped * a else 0.0
        weight = 1.0
        if loss.tis != "off":
            over = mine if loss.tis.startswith("sequence") else [row]
            weight = math.exp(sum(r["old_logprobs"] - r["sampler_logprobs"] for r in over))
            if loss.tis.endswith("truncate"):
                weight = min(weight, loss.tis_cap)
            elif not 1 / loss.tis_cap <= weight <= loss.tis_cap:
                weight = 0.0
        d = row["ref_logprobs"] - lp
        kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[loss.kl_estimator]
        kl_slope = {"k1": -d, "k2": -d, "k3": 1 - math.exp(d)}[loss.kl_estimator]
        w = row["weights"]
        total += w * (-weight * surrogate + loss.kl_coef * kl - loss.entropy_coef * row["entropies"])
        slopes.append(w * (-weight * slope + loss.kl_coef * kl_slope))
        entropy_slopes.append(-w * loss.entropy_coef)
    return total, slopes, entropy_slopes


OBJECTIVES: list[dict[str, Any]] = [
    {"kl_coef": 0.0},
    {"kl_coef": 0.3},
    {"kl_coef": 0.3, "kl_estimator": "k1"},
    {"kl_coef": 0.3, "kl_estimator": "k2"},
    {"kl_coef": 0.0, "entropy_coef": 0.05},
    {"kl_coef": 0.0, "clip_low": 0.2, "clip_high": 0.28},
    {"objective": "gspo", "aggregation": "sequence", "clip_low": 0.02, "clip_high": 0.03, "kl_coef": 0.0},
    {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.3, "kl_coef": 0.0},
    {"tis": "token_truncate", "tis_cap": 1.2, "kl_coef": 0.1},
    {"tis": "token_mask", "tis_cap": 1.2, "kl_coef": 0.1},
    {"tis": "sequence_truncate", "tis_cap": 2.0, "kl_coef": 0.0},
    {"tis": "sequence_mask", "tis_cap": 2.0, "kl_coef": 0.0},
]


@pytest.mark.parametrize("options", OBJECTIVES, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))
def test_loss_and_gradient_against_the_formula(options: dict[str, Any]):
    seed, loss = torch.seed() % 2**32, Loss(**options)
    t = tokens(seed)
    value = policy_loss(t, loss)
    value.backward()
    total, slopes, entropy_slopes = expected(plain(t), loss)
    assert value.item() == pytest.approx(total, rel=1e-4, abs=1e-3), f"seed {seed}"
    assert t.logprobs.grad is not None
    assert t.logprobs.grad.tolist() == pytest.approx(slopes, rel=1e-3, abs=2e-5), f"seed {seed}"
    if loss.entropy_coef:
        assert t.entropies.grad is not None
        assert t.entropies.grad.tolist() == pytest.approx(entropy_slopes, rel=1e-5), f"seed {seed}"


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gradients_by_finite_differences(estimator: str):
    """autograd in fp64 against the loss itself; k1 and the stop-gradients of the others are held to formulas above."""
    t = tokens(5, 30)
    double = [
        None if p is None else (p.double() if p.is_floating_point() else p)
        for p in map(t.__getattribute__, t.__slots__)
    ]
    loss = Loss(kl_coef=0.2, kl_estimator=estimator, entropy_coef=0.1)  # type: ignore[arg-type]

    def value(logprobs: Tensor, entropies: Tensor) -> Tensor:
        return policy_loss(Tokens(logprobs, entropies, *double[2:]), loss)  # type: ignore[arg-type]

    inputs = [p.detach().requires_grad_() for p in double[:2] if p is not None]
    assert torch.autograd.gradcheck(value, inputs)


def test_gspo_is_the_gradient_of_the_sequence_ratio():
    """One advantage a sequence, its mean as aggregation: −Σ_s min(sÂ, clip(s)Â), differentiated as it stands."""
    t = tokens(11)
    counts = torch.bincount(t.sequence).float()
    per_sequence = torch.randn(SEQUENCES, generator=torch.Generator().manual_seed(1))
    t = Tokens(
        t.logprobs,
        t.entropies,
        t.old_logprobs,
        t.old_logprobs,
        per_sequence[t.sequence],
        1 / counts[t.sequence],
        t.sequence,
    )
    loss = Loss(objective="gspo", aggregation="sequence", clip_low=0.01, clip_high=0.01, kl_coef=0.0)
    value = policy_loss(t, loss)
    (got,) = torch.autograd.grad(value, t.logprobs)
    s = (torch.zeros(SEQUENCES).index_add(0, t.sequence, t.logprobs - t.old_logprobs) / counts).exp()
    whole = -torch.minimum(s * per_sequence, s.clamp(0.99, 1.01) * per_sequence).sum()
    (want,) = torch.autograd.grad(whole, t.logprobs)
    assert value.item() == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    assert (want == 0).any() and (want != 0).any(), "some sequences are clipped and some are not"


def test_k1_is_unbiased_and_has_the_gradient_of_the_kl():
    """Summed over the vocabulary instead of sampled: Σ p·k1 is the KL, Σ p·∇k1 its gradient; plain −d would give 0."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    kl = (policy.exp() * (policy - reference)).sum()
    (want,) = torch.autograd.grad(kl, logits, retain_graph=True)
    sampled = policy.exp().detach()
    estimate = (sampled * kl_divergence(policy, reference, "k1")).sum()
    (got,) = torch.autograd.grad(estimate, logits)
    assert estimate.item() == pytest.approx(kl.item(), rel=1e-12)
    torch.testing.assert_close(got, want)


def test_on_policy_gradient_is_the_advantage():
    t = tokens(1)
    on_policy = Tokens(
        t.logprobs, t.entropies, t.logprobs.detach(), t.logprobs.detach(), t.advantages, t.weights, t.sequence
    )
    for objective in ("clip", "cispo"):
        (gradient,) = torch.autograd.grad(policy_loss(on_policy, Loss(objective=objective, kl_coef=0.0)), t.logprobs)
        torch.testing.assert_close(gradient, -t.advantages * t.weights)


@pytest.mark.parametrize("tis", ["off", "token_truncate", "sequence_mask"])
@pytest.mark.parametrize("objective", ["clip", "gspo", "cispo"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_an_extreme_ratio_gives_a_finite_gradient(tis, objective, estimator):
    new = torch.tensor([-0.1, -200.0], requires_grad=True)
    old = torch.tensor([-200.0, -0.1])
    t = Tokens(
        new, torch.ones(2), old, new.detach(), torch.tensor([1.0, -1.0]), torch.ones(2), torch.tensor([0, 1]), old
    )
    aggregation = "sequence" if objective == "gspo" else "token"
    loss = Loss(objective=objective, aggregation=aggregation, tis=tis, kl_coef=0.1, kl_estimator=estimator)
    value = policy_loss(t, loss)
    value.backward()
    assert value.isfinite() and new.grad is not None and new.grad.isfinite().all()


def test_kl_is_never_negative_and_zero_for_equal_policies():
    t = tokens(2)
    assert t.ref_logprobs is not None
    for estimator in ("k2", "k3"):
        assert (kl_divergence(t.logprobs, t.ref_logprobs, estimator) >= 0).all()
        assert (kl_divergence(t.logprobs, t.logprobs, estimator) == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_pulls_back_however_far_the_policy_has_gone(estimator: str):
    """Where the reference gives a token e⁻⁵ to e⁻²⁰⁰ of the policy's probability, a lower KL wants less of it."""
    logprobs = torch.full((4,), -0.1, requires_grad=True)
    kl_divergence(logprobs, logprobs.detach() - torch.tensor([5.0, 19.0, 21.0, 200.0]), estimator).sum().backward()
    assert logprobs.grad is not None and (logprobs.grad > 0.99).all()


def test_importance_weights_are_one_where_engine_and_trainer_agree():
    t = tokens(3)
    same = Tokens(t.logprobs, t.entropies, t.old_logprobs, t.old_logprobs, t.advantages, t.weights, t.sequence)
    for tis in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        loss = Loss(tis=tis, kl_coef=0.0)
        assert (importance_weights(same, loss) == 1).all()
        assert policy_loss(same, loss).item() == policy_loss(same, Loss(kl_coef=0.0)).item()


def test_metrics():
    seed = torch.seed() % 2**32
    t, loss = tokens(seed, 100), Loss(tis="token_truncate", tis_cap=1.2)
    metrics = update_metrics(metric_columns(t.detach(), loss), loss)
    rows = plain(t)
    ratio = np.array([math.exp(r["logprobs"] - r["old_logprobs"]) for r in rows])
    a = np.array([r["advantages"] for r in rows])
    weight = np.minimum([math.exp(r["old_logprobs"] - r["sampler_logprobs"]) for r in rows], 1.2)
    assert metrics["policy/ratio_max"] == pytest.approx(ratio.max(), rel=1e-5), f"seed {seed}"
    assert metrics["policy/clip_low_fraction"] == pytest.approx(np.mean((ratio < 0.8) & (a < 0)))
    assert metrics["policy/clip_high_fraction"] == pytest.approx(np.mean((ratio > 1.4) & (a > 0)))
    assert metrics["policy/entropy"] == pytest.approx(np.mean([r["entropies"] for r in rows]), rel=1e-6)
    assert metrics["policy/trained_tokens"] == 100
    assert metrics["mismatch/tis_weight_mean"] == pytest.approx(weight.mean(), rel=1e-5)
    assert metrics["mismatch/tis_limited_fraction"] == pytest.approx(np.mean(weight == 1.2))
    capped = update_metrics(metric_columns(t.detach(), Loss(objective="cispo")), Loss(objective="cispo"))
    assert capped["policy/clip_high_fraction"] == pytest.approx(np.mean(ratio > 1.4))
    mismatch = mismatch_metrics(t.logprobs.detach(), t.old_logprobs)
    difference = np.abs((t.logprobs.detach() - t.old_logprobs).double().numpy())
    assert mismatch["mismatch/logprob_diff_mean"] == pytest.approx(difference.mean())
    assert mismatch["mismatch/logprob_diff_max"] == pytest.approx(difference.max())
    assert mismatch["mismatch/logprob_diff_p95"] == pytest.approx(np.sort(difference)[94])
    assert mismatch["mismatch/ratio_outside_fraction"] == pytest.approx(np.mean((ratio < 0.9) | (ratio > 1.1)))


def test_placeholders_are_not_counted():
    t, loss = tokens(4, 50), Loss()
    t.weights[-1] = 0.0
    assert metric_columns(t.detach(), loss).shape == (7, 49)
    assert policy_ratio(t, loss).shape == (50,)
    assert cispo(t.logprobs, torch.ones(50), t.advantages, 0.2, 0.2).shape == (50,)
    assert clipped_surrogate(torch.ones(50), t.advantages, 0.2, 0.2).tolist() == (-t.advantages).tolist()

"""The clipped surrogate, its KL and the mismatch metrics, against the formulas token by token in fp64."""

import math

import numpy as np
import pytest
import torch

from axpo.loss import kl_divergence, mismatch_metrics, policy_loss, policy_metrics


def tokens(seed: int, count: int = 400) -> list[torch.Tensor]:
    """logprobs, old_logprobs, advantages, weights, ref_logprobs; ratios on both sides of both clips."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(count, generator=generator) * 3
    new = old + torch.randn(count, generator=generator) * 0.4
    advantages = torch.randn(count, generator=generator)
    weights = torch.rand(count, generator=generator)
    return [new, old, advantages, weights, old + 0.1 * torch.randn(count, generator=generator)]


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_loss_and_gradient_against_the_formula(kl_coef: float):
    seed = torch.seed() % 2**32
    new, old, advantages, weights, ref = tokens(seed)
    new.requires_grad_()
    loss = policy_loss(new, old, advantages, weights, clip_low=0.2, clip_high=0.4, kl_coef=kl_coef, ref_logprobs=ref)
    loss.backward()
    expected, slopes = 0.0, []
    for lp, lo, a, w, lr in zip(
        *(t.double().tolist() for t in (new.detach(), old, advantages, weights, ref)), strict=True
    ):
        ratio = math.exp(lp - lo)
        clipped = min(max(ratio, 0.8), 1.4)
        surrogate = min(ratio * a, clipped * a)
        kl = math.exp(lr - lp) - (lr - lp) - 1
        expected -= w * (surrogate - kl_coef * kl)
        stopped = (ratio > 1.4 and a > 0) or (ratio < 0.8 and a < 0)
        slopes.append(-w * ((0 if stopped else ratio * a) - kl_coef * (1 - math.exp(lr - lp))))
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4), f"seed {seed}"
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx(slopes, rel=1e-3, abs=1e-5), f"seed {seed}"


def test_on_policy_gradient_is_the_advantage():
    new, _, advantages, weights, _ = tokens(1)
    new.requires_grad_()
    policy_loss(new, new.detach(), advantages, weights, clip_low=0.2, clip_high=0.4).backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, -advantages * weights)


def test_an_extreme_ratio_gives_a_finite_gradient():
    new = torch.tensor([-0.1, -200.0], requires_grad=True)
    old = torch.tensor([-200.0, -0.1])
    loss = policy_loss(
        new, old, torch.tensor([1.0, -1.0]), torch.ones(2), clip_low=0.2, clip_high=0.4, kl_coef=0.1, ref_logprobs=old
    )
    loss.backward()
    assert loss.isfinite() and new.grad is not None and new.grad.isfinite().all()


def test_kl_is_never_negative_and_zero_for_equal_policies():
    new, _, _, _, ref = tokens(2)
    assert (kl_divergence(new, ref) >= 0).all()
    assert (kl_divergence(new, new) == 0).all()


def test_metrics():
    seed = torch.seed() % 2**32
    new, old, advantages, _, _ = tokens(seed, 100)
    metrics = policy_metrics(new, old, advantages, torch.full((100,), 2.0), 0.2, 0.4)
    ratio = np.exp((new - old).double().numpy())
    a = advantages.numpy()
    assert metrics["policy/ratio_max"] == pytest.approx(ratio.max(), rel=1e-5), f"seed {seed}"
    assert metrics["policy/clip_low_fraction"] == pytest.approx(np.mean((ratio < 0.8) & (a < 0)))
    assert metrics["policy/clip_high_fraction"] == pytest.approx(np.mean((ratio > 1.4) & (a > 0)))
    assert metrics["policy/entropy"] == 2.0 and metrics["policy/trained_tokens"] == 100
    mismatch = mismatch_metrics(new, old)
    difference = np.abs((new - old).double().numpy())
    assert mismatch["mismatch/logprob_diff_mean"] == pytest.approx(difference.mean())
    assert mismatch["mismatch/logprob_diff_max"] == pytest.approx(difference.max())
    assert mismatch["mismatch/logprob_diff_p95"] == pytest.approx(np.sort(difference)[94])
    assert mismatch["mismatch/ratio_outside_fraction"] == pytest.approx(np.mean((ratio < 0.9) | (ratio > 1.1)))

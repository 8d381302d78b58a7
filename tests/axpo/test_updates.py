"""Several updates a batch, π_old and importance correction, aggregation, and updates that are kept and replayed."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from axpo.checkpoint import latest, load_checkpoint
from axpo.config import Config, Loss, Optim, Train
from axpo.learner import Learner, Minibatch, NonFiniteError, score
from axpo.loss import Tokens, policy_loss
from axpo.paths import model_directory
from axpo.replay import Watch, _kept_rows, _read_rows, keep_update
from axpo.tree import PackedBatch, build_trees, concatenate
from engine.models import ModelConfig, Predict, Qwen3VL
from engine.weights import load_weights
from kernels import linear_logprob_entropy
from kernels.sampling import sample
from tests.axpo.factory import IMAGE, write_checkpoint
from tests.axpo.learner_worker import batches, build_learner, fixed_step


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("policy") / "tied")


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: p.full_tensor().clone() for name, p in learner.model.named_parameters()}  # pyright: ignore


def plain_updates(path: Path, parts: list[list[PackedBatch]], passes: int, lr: float) -> dict[str, Tensor]:
    """The same updates on the unsharded model, with torch's AdamW: π_old is scored once, before the first."""
    model = Qwen3VL(build_learner(path).config)
    load_weights(model, path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, eps=1e-3)
    loss = Loss(kl_coef=0.0)
    with torch.no_grad():
        old = [[score(model, row, 0.9)[0] for row in part] for part in parts]
    for part, scored in [*zip(parts, old, strict=True)] * passes:
        weight = sum(row.weights.sum() for row in part)
        for row, before in zip(part, scored, strict=True):
            logprobs, entropies = score(model, row, 0.9)
            given = before, row.old_logprobs, row.advantages, row.weights, row.sequence
            (policy_loss(Tokens(logprobs, entropies, *given), loss) / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def test_several_updates_against_the_policy_before_the_first(checkpoint: Path):
    parts = [batches(0), batches(1)]
    learner = build_learner(
        checkpoint,
        optim=Optim(lr=1e-3, eps=1e-3, grad_clip=0.0),
        loss=Loss(kl_coef=0.0),
        train=Train(updates_per_batch=4, minibatches=2),
    )
    metrics = learner.step(*parts)
    assert metrics["policy/updates"] == learner.updates == 4
    assert metrics["policy/trained_tokens"] == 2 * sum(len(row.labels) for part in parts for row in part)
    assert metrics["policy/ratio_max"] > 1, "the second update is off the policy that was scored"
    for name, weight in plain_updates(checkpoint, parts, 2, 1e-3).items():
        torch.testing.assert_close(
            learner.model.get_parameter(name).full_tensor(), weight, rtol=1e-4, atol=2e-6, msg=name
        )  # pyright: ignore


def test_the_mismatch_is_that_of_the_weights_that_sampled(checkpoint: Path):
    """It is measured where π_old is scored, whatever the updates do then; and the rate is one a step."""
    once = build_learner(checkpoint).step(batches(0))
    learner = build_learner(checkpoint, train=Train(updates_per_batch=3))
    several = learner.step(batches(0))
    assert {k: v for k, v in once.items() if k.startswith("mismatch/")}.items() <= several.items()
    assert several["policy/lr"] == once["policy/lr"] and learner.updates == 3
    assert learner.step(batches(0))["policy/lr"] == 2 * once["policy/lr"], "warm-up counts steps"


def test_an_empty_minibatch_is_passed_over(checkpoint: Path):
    learner = build_learner(checkpoint, train=Train(updates_per_batch=2, minibatches=2))
    metrics = learner.step([], batches(0))
    assert metrics["policy/updates"] == learner.updates == 1
    assert metrics["policy/trained_tokens"] == sum(len(row.labels) for row in batches(0))


def test_truncated_importance_sampling_makes_the_policy_its_own_old_one(checkpoint: Path):
    """One update: the ratio is 1, and the engine's mismatch is a constant weight of at most the cap."""
    loss = Loss(tis="token_truncate", tis_cap=1.5, kl_coef=0.0)
    learner = build_learner(checkpoint, loss=loss)
    rows = batches(0)
    with torch.no_grad():
        scored = [score(learner.model, row, 0.9)[0] for row in rows]
    learner.model.reshard()  # type: ignore[operator]
    w = torch.cat([(new - row.old_logprobs).exp() for new, row in zip(scored, rows, strict=True)]).clamp(max=1.5)
    advantages = torch.cat([row.advantages for row in rows])
    metrics = learner.step(rows)
    assert metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/loss"] == pytest.approx(-(w * advantages).mean().item(), rel=1e-4)
    assert metrics["mismatch/tis_weight_mean"] == pytest.approx(w.mean().item(), rel=1e-5)
    assert 0 < metrics["mismatch/tis_limited_fraction"] == pytest.approx((w == 1.5).float().mean().item())


def test_dr_grpo_divides_by_a_constant_length(checkpoint: Path):
    """Σ over tokens / (trajectories · max_new_tokens): the token mean, times tokens, over that."""
    token = build_learner(checkpoint, loss=Loss(kl_coef=0.0)).step(batches(0))
    learner = build_learner(checkpoint, loss=Loss(kl_coef=0.0, aggregation="constant"), max_new_tokens=50)
    constant = learner.step(batches(0))
    groups, resamples = fixed_step(0)
    trained = [t for group in [*groups, *resamples.values()] for t in group if any(t.loss_mask)]
    factor = token["policy/trained_tokens"] / (len(trained) * 50)
    assert constant["policy/loss"] == pytest.approx(token["policy/loss"] * factor, rel=1e-6)
    assert constant["policy/grad_norm"] == pytest.approx(token["policy/grad_norm"] * factor, rel=1e-6)


@pytest.mark.parametrize("budget", [60, 10_000])
def test_a_sequence_is_what_one_trajectory_trains(budget: int):
    """The row's sequences are the trajectories' trained tokens: prefix of a source, continuation without it."""
    groups, resamples = fixed_step(0)
    trees = [tree for group in groups for tree in build_trees(group, resamples, IMAGE, budget=budget)]
    row = concatenate(trees)
    found = [row.labels[row.sequence == s].tolist() for s in range(row.num_sequences)]
    trained = [t for group in [*groups, *resamples.values()] for t in group if any(t.loss_mask)]
    want = [[token for token, mask in zip(t.tokens, t.loss_mask, strict=True) if mask] for t in trained]
    assert sorted(found) == sorted(want) and row.num_sequences == int(row.sequence.max()) + 1


@pytest.mark.parametrize("objective", ["gspo", "cispo"])
def test_every_objective_trains_and_splits_into_micro_batches(checkpoint: Path, objective):
    aggregation = "sequence" if objective == "gspo" else "token"
    loss = Loss(objective=objective, aggregation=aggregation, entropy_coef=0.01, tis="sequence_truncate")
    groups, resamples = fixed_step(0)
    trees = [t for g in groups for t in build_trees(g, resamples, IMAGE, aggregation=aggregation, budget=60)]
    one, many = (build_learner(checkpoint, loss=loss).step(rows) for rows in ([concatenate(trees)], trees))
    for name in ("policy/loss", "policy/grad_norm", "policy/ratio_max", "mismatch/tis_weight_mean"):
        assert many[name] == pytest.approx(one[name], rel=1e-4), name
    assert one["policy/grad_norm"] > 0


def poison(learner: Learner, name: str, value: float) -> None:
    """As a damaged checkpoint would: one weight is no number any more."""
    with torch.no_grad():
        learner.model.get_parameter(name).to_local().view(-1)[5] = value  # type: ignore[attr-defined]


BAD = "model.language_model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(("value", "updates"), [(math.inf, 1), (math.nan, 2)])
def test_a_bad_weight_is_found_when_its_update_is_replayed(
    checkpoint: Path, tmp_path: Path, value: float, updates: int
):
    """The kept update alone is enough: another learner fails in the same way, and the first bad output is named."""
    train = Train(updates_per_batch=updates)
    learner = build_learner(checkpoint, train=train)
    learner.step(batches(0))
    poison(learner, f"{BAD}.weight", value)
    with pytest.raises(NonFiniteError, match=r"the weights were not changed") as failure:
        learner.step(batches(1))
    kept = keep_update(tmp_path / "step_000002", Config(), learner, failure.value.minibatch)
    again = build_learner(checkpoint, train=train)
    found = latest(kept / "checkpoint")
    assert found is not None
    load_checkpoint(found, again)
    assert again.updates == learner.updates
    minibatch = _read_rows(sorted(kept.glob("rows_rank*.pt")))
    assert (minibatch.old_logprobs is None) == (updates == 1)
    for mine, theirs in zip(minibatch.rows, failure.value.minibatch.rows, strict=True):
        for name in mine.__slots__:
            if name != "images":
                torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=0, atol=0, equal_nan=True)
        assert [image.key for image in mine.images] == [image.key for image in theirs.images]
    watch = Watch(again, minibatch)
    with pytest.raises(NonFiniteError) as replayed:
        again.replay(minibatch)
    assert str(replayed.value) == str(failure.value)
    weight, first = watch.report()
    assert weight.startswith(f"weight {BAD}.weight: ") and " of 1536 numbers" in weight
    assert first.startswith(f"first non-finite tensor: forward, output of {BAD}: ")


def test_a_gradient_that_overflows_is_found_in_the_backward_pass(checkpoint: Path):
    """Weights and outputs are finite: only a gradient is not. The update names the weights, the watch the tensor."""
    learner = build_learner(checkpoint, loss=Loss(kl_coef=0.0))
    rows = batches(0)
    rows[0].advantages[0], rows[0].weights[0] = 3e38, 1e3
    rows[0].old_logprobs[0] += -5.0
    watch = Watch(learner, Minibatch(rows))
    with pytest.raises(NonFiniteError, match=r"gradient norm (nan|inf) \(\d+ gradients, the last of them model\."):
        learner.step(rows)
    (line,) = watch.report()
    assert line.startswith("first non-finite tensor: backward, gradient of the output of "), line


def test_what_is_no_kept_update_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"debug\.replay = .*no config\.toml; give <run\.dir>"):
        _kept_rows(tmp_path)


def test_the_head_and_the_sampler_have_the_same_bits():
    """So engine and trainer differ by what lies below the LM head alone."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 64, generator=generator) for rows in (100, 300))
    whole = torch.arange(100)
    ones, none = torch.ones(100), torch.zeros(100, dtype=torch.int64)
    labels, logprobs, entropies = sample(F.linear(hidden, weight), whole, whole, ones, none, ones)
    scored = linear_logprob_entropy(hidden, weight, labels.long())
    assert torch.equal(scored[0], logprobs) and torch.equal(scored[1], entropies)


def test_predictions_from_one_row_add_up_in_one_order():
    """Branches share the row that predicts them; with two threads plain indexing adds their gradients as it comes."""
    model = Qwen3VL(ModelConfig.from_pretrained(model_directory("mini")))
    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        index = torch.randint(64, (2000,), generator=generator)
        labels = torch.randint(500, (2000,), generator=generator)
        hidden = torch.randn(64, 128, generator=generator)
        got = []
        for _ in range(8):
            leaf = hidden.clone().requires_grad_()
            model.model.forward = lambda *_, leaf=leaf: leaf  # type: ignore[method-assign]
            logprobs, _ = model(labels, labels, None, None, Predict(index, labels))
            logprobs.square().sum().backward()
            got.append(leaf.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, got[0]) for gradient in got)


def test_a_sampler_without_numbers_is_named(checkpoint: Path):
    learner = build_learner(checkpoint)
    rows = batches(0)
    rows[0].old_logprobs[2] = math.nan
    with pytest.raises(NonFiniteError, match="no finite log-prob of the sampler") as failure:
        learner.step(rows)
    watch = Watch(learner, failure.value.minibatch)
    count = len(rows[0].labels)
    assert watch.given == [f"input old_logprobs of row 0: 1 NaN and 0 infinite of {count} numbers, shape [{count}]"]

"""The trainer: packed equals one by one, two ranks equal one, runs repeat bit for bit, bad numbers change nothing."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from axpo.advantage import assign_credit
from axpo.checkpoint import load_checkpoint
from axpo.config import Loss, Optim
from axpo.learner import Learner, NonFiniteError, learning_rate, placeholder, score
from axpo.loss import Tokens, policy_loss
from axpo.packing import pack_trees
from axpo.tree import PackedBatch, build_trees, concatenate
from axpo.weights_sync import push_weights
from engine.models import ModelConfig, Qwen3VL
from engine.weights import load_weights, read_tensors
from tests.axpo.factory import IMAGE, alone, random_group, random_resamples, write_checkpoint
from tests.axpo.learner_worker import UPDATES, batches, build_learner, fixed_step, launch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("policy") / "tied")


@pytest.fixture(scope="module")
def two_ranks(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch("learner_worker.py", checkpoint, tmp_path_factory.mktemp("two"))


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: p.full_tensor().clone() for name, p in learner.model.named_parameters()}  # pyright: ignore[reportAttributeAccessIssue]


def gradients(model: Qwen3VL, rows: list[PackedBatch]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the rows together, with one denominator."""
    model.zero_grad()
    weight = sum(row.weights.sum().item() for row in rows)
    total = 0.0
    for row in rows:
        logprobs, entropies = score(model, row, temperature=0.8)
        reference = logprobs.detach() + 0.1 * torch.sin(row.labels.float())
        old = row.old_logprobs, row.old_logprobs
        tokens = Tokens(logprobs, entropies, *old, row.advantages, row.weights, row.sequence, reference)
        loss = policy_loss(tokens, Loss(kl_coef=0.5, entropy_coef=-0.01)) / weight
        loss.backward()
        total += loss.item()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return total, {name: grad.clone() for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize(("tie", "aggregation"), [(True, "token"), (False, "sequence")])
def test_packed_trees_train_like_separate_trajectories(tie: bool, aggregation, tmp_path: Path):
    """Loss and every gradient, fp32, 1e-5 relative; images in the prompt and in observations, forks inside."""
    seed = random.getrandbits(32)
    rng = random.Random(seed)
    path = write_checkpoint(tmp_path / "policy", seed=seed, tie=tie)
    model = Qwen3VL(ModelConfig.from_pretrained(path))
    load_weights(model, path)
    groups = [random_group(rng, g, tool_rate=0.8) for g in range(2)]
    resamples = {r.id: random_resamples(rng, r, 3) for g in groups for r in g[:3] if r.used_tool}
    for trajectory in [t for group in [*groups, *resamples.values()] for t in group]:
        trajectory.logprobs = [None if lp is None else -4.0 + 0.3 * lp for lp in trajectory.logprobs]
    assign_credit(groups, resamples)
    trees = [tree for group in groups for tree in build_trees(group, resamples, IMAGE, aggregation=aggregation)]
    packed = pack_trees(trees, 10_000)
    single = [alone(t) for group in [*groups, *resamples.values()] for t in group]
    separate = [row for t in single for row in build_trees([t], {}, IMAGE, aggregation=aggregation)]
    assert len(packed) == 1 and len(separate) > 4
    loss, got = gradients(model, packed)
    expected_loss, expected = gradients(model, separate)
    assert loss == pytest.approx(expected_loss, rel=1e-5), f"seed {seed}"
    assert got.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name in expected:
        error = (got[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert error < 1e-5, f"{name}: {error:.1e}, seed {seed}"


def test_two_ranks_train_like_one(checkpoint: Path, two_ranks: Path):
    """The same losses and weights, also in a step that gives one rank no work and the other no image."""
    learner = build_learner(checkpoint)
    first, second = json.loads((two_ranks / "ranks.json").read_text())
    assert first == second
    for update in range(UPDATES):
        metrics = learner.step(batches(update))
        assert metrics.keys() == first["metrics"][update].keys()
        for name, value in metrics.items():
            assert first["metrics"][update][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (update, name)
    exported = dict(read_tensors(two_ranks / "policy"))
    for name, weight in weights(learner).items():
        torch.testing.assert_close(exported[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert first["copied"] == sum(4 * weight.numel() for weight in exported.values())
    digest = dict(zip(dict(learner.model.named_parameters()), first["digest"], strict=True))
    assert digest == {name: exported[name].double().sum().item() for name in digest}, "the engine got the same weights"


def test_a_checkpoint_of_two_ranks_loads_on_one(checkpoint: Path, two_ranks: Path):
    learner = build_learner(checkpoint)
    progress = load_checkpoint(two_ranks / "checkpoints" / f"step_{UPDATES:06d}", learner)
    assert progress.consumed_groups == 11 and learner.updates == UPDATES
    exported = dict(read_tensors(two_ranks / "policy"))
    assert all(torch.equal(exported[name], weight) for name, weight in weights(learner).items())
    learner.step(batches(0))


def test_a_run_repeats_bit_for_bit(checkpoint: Path):
    runs = []
    for _ in range(2):
        learner = build_learner(checkpoint)
        runs.append(([learner.step(batches(update)) for update in range(UPDATES)], weights(learner)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(weight, runs[1][1][name]) for name, weight in runs[0][1].items())


def test_the_metrics_describe_the_step(checkpoint: Path):
    learner = build_learner(checkpoint)
    before = weights(learner)
    metrics = learner.step(batches(0))
    groups, resamples = fixed_step(0)
    trained = sum(sum(t.loss_mask) for group in [*groups, *resamples.values()] for t in group)
    assert metrics["policy/trained_tokens"] == trained
    assert metrics["policy/kl"] == 0.0, "before the first update the policy is the reference"
    assert metrics["policy/lr"] == 5e-3
    assert learner.step(batches(0))["policy/kl"] > 0
    assert all(not torch.equal(before[name], weight) for name, weight in weights(learner).items())
    reference = {name: p.full_tensor() for name, p in learner.reference.named_parameters()}  # pyright: ignore
    assert all(torch.equal(before[name], weight) for name, weight in reference.items())


def test_without_kl_there_is_no_reference(checkpoint: Path):
    learner = build_learner(checkpoint, loss=Loss(kl_coef=0.0))
    assert learner.reference is None and "policy/kl" not in learner.step(batches(0))


def test_gradient_clipping_bounds_the_update(checkpoint: Path):
    """With plain gradients (Adam's first step is ±lr): the norm that is reported is the one before clipping."""
    free, tight = (build_learner(checkpoint, optim=Optim(lr=1e-3, eps=1.0, grad_clip=clip)) for clip in (0.0, 1e-3))
    before = weights(free)
    assert free.step(batches(0))["policy/grad_norm"] == tight.step(batches(0))["policy/grad_norm"] > 1e-3

    def moved(learner: Learner) -> float:
        return math.sqrt(sum((w - before[n]).double().square().sum().item() for n, w in weights(learner).items()))

    assert moved(tight) < moved(free) / 10
    assert moved(tight) == pytest.approx(1e-6, rel=0.05)


def test_non_finite_numbers_change_nothing(checkpoint: Path):
    learner = build_learner(checkpoint)
    learner.step(batches(0))
    before, updates = weights(learner), learner.updates
    poisoned = batches(1)
    poisoned[0].advantages[3] = math.inf
    with pytest.raises(NonFiniteError, match=r"update 2: .*weights were not changed"):
        learner.step(poisoned)
    assert learner.updates == updates
    assert all(torch.equal(before[name], weight) for name, weight in weights(learner).items())
    assert all(p.grad is None for p in learner.model.parameters())
    learner.step(batches(1))


def test_what_cannot_be_trained_on_is_refused(checkpoint: Path):
    learner = build_learner(checkpoint)
    unsampled = batches(0)
    unsampled[0].old_logprobs[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"update 1: .* no finite log-prob of the sampler"):
        learner.step(unsampled)
    before = weights(learner)
    assert learner.step([]) == {"policy/updates": 0.0} and learner.updates == 0
    assert all(torch.equal(before[name], weight) for name, weight in weights(learner).items())
    with pytest.raises(ValueError, match="no rank has a trained token"):
        learner.sft_step([])
    with pytest.raises(ValueError, match="sft_step"):
        build_learner(checkpoint, loss=None).step(batches(0))


def test_sft_minimises_the_cross_entropy(checkpoint: Path):
    learner = build_learner(checkpoint, loss=None, temperature=1.0)
    rows = batches(0)
    model = Qwen3VL(learner.config)
    load_weights(model, checkpoint)
    logprobs = torch.cat([score(model, row, 1.0)[0] for row in rows])
    assert learner.sft_loss(rows) == pytest.approx(-logprobs.mean().item(), rel=1e-5)
    first = learner.sft_step(rows)
    assert first["policy/loss"] == pytest.approx(-logprobs.mean().item(), rel=1e-5)
    losses = [learner.sft_step(rows)["policy/loss"] for _ in range(4)]
    assert losses[-1] < first["policy/loss"] - 0.2


def test_the_placeholder_changes_nothing(checkpoint: Path):
    config = ModelConfig.from_pretrained(checkpoint)
    model = Qwen3VL(config)
    load_weights(model, checkpoint)
    row = batches(0)[0]
    joined = concatenate([row, placeholder(config)])
    loss, expected = gradients(model, [row])
    same, got = gradients(model, [joined])
    assert same == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_a_model_without_vision_trains(tmp_path: Path):
    learner = build_learner(write_checkpoint(tmp_path / "text", vision=False))
    assert placeholder(learner.config).images == ()
    before = weights(learner)
    assert learner.step(batches(2))["policy/grad_norm"] > 0
    assert all(not torch.equal(before[name], weight) for name, weight in weights(learner).items())


def test_weights_from_scratch(checkpoint: Path):
    a, b, c = (weights(build_learner(checkpoint, loss=None, scratch_seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(weight, b[name]) for name, weight in a.items())
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(a[name], c[name])
    assert a[name].std().item() == pytest.approx((48 * 2 * 2) ** -0.5, rel=0.1)  # fan-in, two writers a layer
    assert a["model.language_model.embed_tokens.weight"].std().item() == pytest.approx(1.0, rel=0.1)
    assert (a["model.language_model.norm.weight"] == 32**-0.5).all()  # tied: the first logits have variance 1
    assert (a["model.language_model.layers.0.input_layernorm.weight"] == 1).all()
    assert (a["model.visual.blocks.0.attn.qkv.bias"] == 0).all()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.854, 0.5, 0.146]),
    ],
)
def test_learning_rate(schedule, expected: list[float]):
    optim = Optim(lr=2e-3, warmup_steps=2, schedule=schedule)
    rates = [learning_rate(update, optim, total_steps=6) / 2e-3 for update in range(6)]
    assert rates == pytest.approx(expected, abs=1e-3)
    assert learning_rate(9, optim, total_steps=6) == pytest.approx(2e-3 if schedule == "constant" else 0.0)


def test_one_rank_and_equal_dtypes_share_storage(checkpoint: Path):
    learner = build_learner(checkpoint)
    engine = Qwen3VL(learner.config).requires_grad_(False)
    result = push_weights(learner.model, engine)
    assert result.aliased and result.bytes == 0
    address = {name: p.data_ptr() for name, p in engine.named_parameters()}
    learner.step(batches(0))
    for name, weight in weights(learner).items():
        assert torch.equal(engine.get_parameter(name), weight), "an update shows in the engine at once"
    assert push_weights(learner.model, engine).aliased
    assert address == {name: p.data_ptr() for name, p in engine.named_parameters()}


def test_other_dtypes_are_copied_in_place(checkpoint: Path):
    learner = build_learner(checkpoint)
    engine = Qwen3VL(learner.config).to(torch.bfloat16).requires_grad_(False)
    address = {name: p.data_ptr() for name, p in engine.named_parameters()}
    learner.step(batches(0))
    result = push_weights(learner.model, engine)
    assert not result.aliased and result.bytes == sum(2 * p.numel() for p in engine.parameters())
    assert address == {name: p.data_ptr() for name, p in engine.named_parameters()}
    for name, weight in weights(learner).items():
        assert torch.equal(engine.get_parameter(name), weight.to(torch.bfloat16)), name
    learner.step(batches(1))
    with pytest.raises(ValueError, match="differ in parameters"):
        push_weights(learner.model, torch.nn.Linear(1, 1))


def test_bf16_compute_keeps_fp32_masters(checkpoint: Path):
    learner = build_learner(checkpoint, dtype=torch.bfloat16, optim=Optim(lr=1e-5))
    before = weights(learner)
    exact = build_learner(checkpoint).step(batches(0))
    metrics = learner.step(batches(0))
    assert metrics["policy/loss"] == pytest.approx(exact["policy/loss"], abs=0.02)
    assert all(weight.dtype == torch.float32 for weight in before.values())
    moved = [(weight - before[name]).abs().max().item() for name, weight in weights(learner).items()]
    assert all(0 < m < 2e-5 for m in moved), "steps below bf16's resolution are kept"

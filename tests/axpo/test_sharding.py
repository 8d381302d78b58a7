"""Every layout trains alike: one rank or two, replicas, micro-batches, checkpointed activations, offloaded state."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from axpo.checkpoint import Progress, load_checkpoint, save_checkpoint
from axpo.config import Config, Rollout, Train
from axpo.inputs import check_inputs
from axpo.learner import score
from axpo.packing import pack_trees
from axpo.sharding import build_model, load_sharded
from axpo.weights_sync import push_weights
from engine.models import Qwen3VL, fuse_projections
from engine.weights import load_weights, read_tensors
from tests.axpo.factory import write_checkpoint
from tests.axpo.learner_worker import build_learner, launch
from tests.axpo.sharding_worker import BUDGET, LAYOUTS, SAME_BITS, SMALL_BUDGET, train, trees, whole

Found = dict[str, Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("policy") / "untied", tie=False)


@pytest.fixture(scope="module")
def two_ranks(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch("sharding_worker.py", checkpoint, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def two(two_ranks: Path) -> Found:
    return torch.load(two_ranks / "found.pt")


@pytest.fixture(scope="module")
def one(checkpoint: Path) -> Found:
    """The layouts that one rank can have."""
    found = {}
    for name, layout in LAYOUTS.items():
        if "replicas" not in layout:
            metrics, gradients, learner = train(checkpoint, layout)
            weights = whole(dict(learner.model.named_parameters()))
            found[name] = {"metrics": metrics, "gradients": gradients, "weights": weights}
    return found


def assert_close(got: Found, expected: Found, update: int, name: str) -> None:
    """Losses and gradients, fp32, 1e-5 relative. Later updates start from weights that differ in the last bits."""
    loss, wanted = (run["metrics"][update]["policy/loss"] for run in (got, expected))
    assert loss == pytest.approx(wanted, rel=1e-5, abs=1e-7), (name, update)
    norm, wanted = (run["metrics"][update]["policy/grad_norm"] for run in (got, expected))
    assert norm == pytest.approx(wanted, rel=1e-5), (name, update)
    assert got["gradients"][update].keys() == expected["gradients"][update].keys()
    for parameter, gradient in expected["gradients"][update].items():
        error = (got["gradients"][update][parameter] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-5, (name, update, parameter, f"{error:.1e}")


def same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(value, b[key]) for key, value in a.items())
    return all(map(same_bits, a, b)) if isinstance(a, list) else a == b


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_have_the_losses_and_gradients_of_one(layout: str, one: Found, two: Found):
    expected = one["frozen" if "frozen" in layout else "plain"]
    assert_close(two[layout], expected, 0, layout)


def test_a_small_budget_has_the_same_losses_and_gradients(one: Found):
    assert_close(one["small budget"], one["plain"], 0, "one rank")
    weights = one["small budget"]["weights"]
    assert not same_bits(weights, one["plain"]["weights"]), "the budgets would cut the same micro-batches"


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_the_same_layout_has_the_same_bits(ranks: str, request: pytest.FixtureRequest):
    """Metrics, gradients and weights of three updates, the last of which leaves a rank without work."""
    found = request.getfixturevalue(ranks)
    for first, others in SAME_BITS.items():
        for other in others:
            if other in found:
                assert same_bits(found[other], found[first]), (ranks, first, other)


def test_a_frozen_tower_stays(checkpoint: Path, two: Found):
    stored = dict(read_tensors(checkpoint))
    moved = {name for name, weight in two["frozen"]["weights"].items() if not torch.equal(weight, stored[name])}
    assert moved == {name for name in stored if ".visual." not in name}
    assert not any(".visual." in name for name in two["frozen"]["gradients"][0])
    assert all(not torch.equal(weight, stored[name]) for name, weight in two["plain"]["weights"].items())


def test_every_byte_is_read_by_one_rank(checkpoint: Path, two_ranks: Path, two: Found):
    """Also of replicas, where the first reads for all; and every rank has the checkpoint's values."""
    records = json.loads((two_ranks / "ranks.json").read_text())
    stored = dict(read_tensors(checkpoint))
    total = sum(tensor.nbytes for tensor in stored.values())
    sharded = [record["read"]["1"] for record in records]
    assert sum(sharded) == total and max(sharded) < 0.6 * total
    assert [record["read"]["2"] for record in records] == [total, 0]
    assert same_bits(two["loaded 1"], stored) and same_bits(two["loaded 2"], stored)


def test_a_rank_does_not_touch_the_rows_of_others(checkpoint: Path):
    """The file's pages that a rank maps: reading half of a large tensor leaves the other half where it is."""
    rows, width = 4096, 1024
    path = checkpoint.parent / "large.safetensors"
    save_file({"weight": torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, width).contiguous()}, path)

    def mapped() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        starts = [i for i, line in enumerate(lines) if line.endswith(path.name)]
        resident = [next(line for line in lines[start:] if line.startswith("Rss:")) for start in starts]
        return sum(int(line.split()[1]) << 10 for line in resident)

    with safe_open(path, framework="pt") as reader:
        half = reader.get_slice("weight")[rows // 2 :].clone()
        touched = mapped()
    assert half[0, 0] == rows // 2 and 0 < touched < 0.6 * rows * width * 4


def test_ranks_share_the_work(two_ranks: Path):
    """Three questions on two ranks: trees move until the work of each is within one tree of the other's."""
    for update in range(2):
        records = [record["packing"][update] for record in json.loads((two_ranks / "ranks.json").read_text())]
        before, after = ([sum(record[name]) for record in records] for name in ("before", "after"))
        sizes = [tokens for record in records for tokens in record["before"]]
        assert sum(before) == sum(after) and before != after
        assert abs(len(records[0]["after"]) - len(records[1]["after"])) <= 1
        assert abs(after[0] - after[1]) <= max(sizes) < abs(before[0] - before[1])
        assert all(tokens <= SMALL_BUDGET or tokens in sizes for record in records for tokens in record["after"])


def test_the_engine_gets_the_weights_and_rolls_out_alone(checkpoint: Path, two_ranks: Path):
    first, second = json.loads((two_ranks / "ranks.json").read_text())
    stored = dict(read_tensors(checkpoint))
    total = sum(tensor.nbytes for tensor in stored.values())
    for record in (first, second):
        assert record["bytes"] == total and record["narrow_bytes"] == total // 2 and record["same"]
        embedding = stored["model.language_model.embed_tokens.weight"]
        root = [embedding, stored["lm_head.weight"], stored["model.language_model.norm.weight"]]
        layers = [sum(t.nbytes for n, t in stored.items() if f".layers.{i}." in n) for i in range(2)]
        assert max(sum(t.nbytes for t in root), *layers) <= record["peak"] < total / 2
    assert first["digest"] == second["digest"]
    assert len(first["sampled"]) == 4 and second["sampled"] == []


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


class Allocated(TorchDispatchMode):
    """Storages in host memory that operators make, by address; they are kept, so that none is given out twice."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            local = getattr(tensor, "_local_tensor", tensor)
            if isinstance(local, Tensor) and local.device.type == "cpu":
                self.storages[local.untyped_storage().data_ptr()] = local.untyped_storage()
        return out


def test_one_rank_allocates_every_parameter_once_and_fused_projections_adjacent(checkpoint: Path):
    config = build_learner(checkpoint).config
    with Allocated() as allocated:
        model = build_model(config, torch.bfloat16, torch.device("cpu"))
    parameters = dict(model.named_parameters())
    held = sum(parameter.numel() * 4 for parameter in parameters.values())
    assert held <= sum(storage.nbytes() for storage in allocated.storages.values()) < held + 4096
    assert load_sharded(model, checkpoint) > 0
    plain = Qwen3VL(config)
    load_weights(plain, checkpoint)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameters[name].full_tensor(), parameter), name  # pyright: ignore[reportAttributeAccessIssue]
    engine = Qwen3VL(config).requires_grad_(False)
    assert push_weights(model, engine).aliased
    fuse_projections(engine)
    layer = engine.model.language_model.layers[0]
    assert layer.self_attn.fused is not None and layer.mlp.fused is not None


def test_what_is_computed_again(checkpoint: Path):
    """Selective: norms and rotary, but no product and no attention. Full: the layer, in tower and language model."""
    calls = {}
    for mode in ("none", "selective", "full"):
        learner = build_learner(checkpoint, train=Train(activation_checkpointing=mode))
        with Calls() as calls[mode]:
            score(learner.model, trees(0)[0], 1.0)[0].sum().backward()
    none, selective, full = (calls[mode].count for mode in ("none", "selective", "full"))
    kept = {name for name in none if name in ("aten::mm", "aten::addmm") or "attention" in name}
    assert len(kept) >= 4 and all(none[name] == selective[name] for name in kept)
    again = {name for name in full if full[name] > none[name]}
    assert {name for name in kept if "backward" not in name} <= again
    cheap = [name for name in none if "rotary" in name or "rmsnorm" in name or "gelu" in name]
    forward = [name for name in cheap if "backward" not in name]
    assert forward and all(none[name] < selective[name] <= full[name] for name in forward)


def test_offloaded_moments_are_saved_and_resumed(checkpoint: Path, tmp_path: Path):
    """Also by a learner that keeps them on its device, bit for bit; and a step moves them there and back."""
    offloaded, plain = (build_learner(checkpoint, train=Train(optimizer_offload=on)) for on in (True, False))
    offloaded.step(pack_trees(trees(0), BUDGET))
    moments = [state["exp_avg"].to_local() for state in offloaded.optimizer.state.values()]
    save_checkpoint(tmp_path, offloaded, Progress(1, 1), keep=1)
    resumed = build_learner(checkpoint, train=Train(optimizer_offload=True))
    for learner in (plain, resumed):
        load_checkpoint(tmp_path / "step_000001", learner)
    metrics = [learner.step(pack_trees(trees(1), BUDGET)) for learner in (offloaded, plain, resumed)]
    assert metrics[0] == metrics[1] == metrics[2]
    weights = [whole(dict(learner.model.named_parameters())) for learner in (offloaded, plain, resumed)]
    assert same_bits(weights[0], weights[1]) and same_bits(weights[0], weights[2])
    after = [state["exp_avg"].to_local() for state in offloaded.optimizer.state.values()]
    assert [t.data_ptr() for t in after] == [t.data_ptr() for t in moments], "the host's memory is kept"


def test_replicas_must_divide_the_ranks():
    """Said with the other inputs, before anything is loaded."""
    config = Config(train=Train(replicas=2))
    with pytest.raises(ValueError, match=r"train.replicas = 2: 1 ranks cannot .* one of 1"):
        check_inputs(config)


def test_the_engine_cannot_sleep_while_it_works():
    with pytest.raises(ValidationError, match=r"sleep_in_training = 'always'.* 'auto' or 'never'"):
        Rollout(overlap=True, sleep_in_training="always")

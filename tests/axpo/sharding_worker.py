"""Trains the same updates in every layout, one after another; run by test_sharding under torchrun, or imported.

`python -m torch.distributed.run --nproc-per-node 2 tests/axpo/sharding_worker.py CHECKPOINT OUT`
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from axpo.config import Loss, Optim, Train
from axpo.distributed import finish, gather_objects, rank, world_size
from axpo.learner import Learner
from axpo.packing import pack_trees
from axpo.sharding import build_model, load_sharded
from axpo.tree import PackedBatch, build_trees
from axpo.weights_sync import push_weights
from engine import LLM, SamplingParams
from engine.models import Qwen3VL
from tests.axpo.factory import IMAGE
from tests.axpo.learner_worker import build_learner, fixed_step

BUDGET, SMALL_BUDGET = 400, 80
UPDATES = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small budget": {"budget": SMALL_BUDGET},
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full"},
    "optimizer offload": {"optimizer_offload": True},
    "reference offload": {"reference_offload": True},
    "replicas": {"replicas": 2},
    "replicas, all else": {
        "replicas": 2,
        "activation_checkpointing": "full",
        "optimizer_offload": True,
        "reference_offload": True,
    },
    "replicas, small budget": {"replicas": 2, "budget": SMALL_BUDGET},
    "frozen": {"freeze_vision": True},
    "frozen, full": {"freeze_vision": True, "activation_checkpointing": "full"},
}
SAME_BITS = {
    "plain": ("selective", "full", "optimizer offload", "reference offload"),
    "replicas": ("replicas, all else",),
    "frozen": ("frozen, full",),
}
"""Layouts that cut the sums in the same way."""


def trees(update: int, budget: int | None = None) -> list[PackedBatch]:
    """This rank's share: update 2 has one question, without an image, so that a second rank may have nothing."""
    groups, resamples = fixed_step(update)
    mine = groups[rank() :: world_size()]
    return [tree for group in mine for tree in build_trees(group, resamples, IMAGE, budget=budget)]


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.full_tensor().clone() for name, tensor in tensors.items()}  # pyright: ignore[reportAttributeAccessIssue]


def train(checkpoint: Path, layout: dict[str, Any]) -> tuple[list[dict[str, float]], list[dict[str, Tensor]], Learner]:
    """Metrics and gradients of every update, and the learner after them. Gradients are not clipped."""
    options = dict(layout)
    budget = options.pop("budget", BUDGET)
    learner = build_learner(
        checkpoint, train=Train(**options), loss=Loss(kl_coef=0.1), optim=Optim(lr=1e-2, weight_decay=0.1, grad_clip=0)
    )
    gradients: list[dict[str, Tensor]] = []

    def keep(*_: object) -> None:
        if len(gradients) == learner.updates:  # an offloaded step has one inside for every parameter
            found = {name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None}
            gradients.append(whole(found))

    learner.optimizer.register_step_pre_hook(keep)
    metrics = [learner.step(pack_trees(trees(update, budget), budget, learner.flops)) for update in range(UPDATES)]
    return metrics, gradients, learner


def main(checkpoint: Path, out: Path) -> None:
    found, record = {}, {}
    for name, layout in LAYOUTS.items():
        metrics, gradients, learner = train(checkpoint, layout)
        weights = whole(dict(learner.model.named_parameters()))
        found[name] = {"metrics": metrics, "gradients": gradients, "weights": weights}
    record["read"] = {}
    for replicas in (1, 2):
        model = build_model(learner.config, torch.float32, torch.device("cpu"), replicas=replicas)
        record["read"][replicas] = load_sharded(model, checkpoint)
        found[f"loaded {replicas}"] = whole(dict(model.named_parameters()))
    record["packing"] = [packing(update) for update in range(2)]
    record |= sync(checkpoint, learner)
    everyone = gather_objects([record])
    if rank() == 0:
        torch.save(found, out / "found.pt")
        (out / "ranks.json").write_text(json.dumps(everyone))


def packing(update: int) -> dict[str, list[int]]:
    """Tokens of this rank's trees before, and of its micro-batches after."""
    mine = trees(update, SMALL_BUDGET)
    after = pack_trees(mine, SMALL_BUDGET)
    return {"before": [tree.num_tokens for tree in mine], "after": [batch.num_tokens for batch in after]}


def sync(checkpoint: Path, learner: Learner) -> dict[str, Any]:
    """An engine that read no file gets the weights; then one rank samples while the other does not."""
    llm = LLM(checkpoint, load_format="dummy", kv_cache_bytes=1 << 20, device="cpu", dtype=torch.float32)
    result = push_weights(learner.model, llm.model)
    llm.weights_updated()
    tokens = []
    if rank() == 0:
        prompt = {"prompt_token_ids": [9, 10, 11]}
        tokens = (
            llm.generate(prompt, SamplingParams(max_tokens=4, seed=1, detokenize=False), use_tqdm=False)[0]
            .outputs[0]
            .token_ids
        )
    engine = Qwen3VL(learner.config).to(torch.bfloat16).requires_grad_(False)
    narrow = push_weights(learner.model, engine)
    same = all(
        torch.equal(engine.get_parameter(name), parameter.to(torch.bfloat16))
        for name, parameter in llm.model.named_parameters()
    )
    return {
        "bytes": result.bytes,
        "peak": result.peak_bytes,
        "narrow_bytes": narrow.bytes,
        "same": same,
        "sampled": list(tokens),
        "digest": [parameter.double().sum().item() for parameter in llm.model.parameters()],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    finish()

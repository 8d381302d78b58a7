"""A whole step of the embedded model with its tool against the paper's words in float64, over transformers' model."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from axpo.advantage import assign_credit
from axpo.branch import Limits
from axpo.config import Algo, Loss, Optim
from axpo.explore import explore
from axpo.packing import pack_trees
from axpo.paths import model_directory
from axpo.rollout import Agent
from axpo.tasks import get_task
from axpo.trajectory import SAMPLED, Trajectory
from axpo.tree import build_trees
from tests.axpo.learner_worker import build_learner
from tests.axpo.paper import Path, Tags, credit, first_call, loss, prefixes

LIMITS = Limits(max_turns=3, max_new_tokens=96, max_tokens=512)
QUESTIONS = (2, 3)  # of seed 0: of both the tool-using rollouts are all wrong, and one has two of them
RATIO, BETA = 0.75, 0.3  # three prefixes of four continuations; a KL that shows in the gradient


def plain(trajectory: Trajectory) -> Path:
    sampled = [role == SAMPLED for role in trajectory.roles]
    images = [(image.pixel_values.double(), image.grid_thw) for image in trajectory.images]
    return Path(trajectory.tokens, sampled, trajectory.logprobs, trajectory.reward, images)


def scorer(model: Any) -> Callable[[Path], Tensor]:
    """Log-prob of each token after those before it, [len] float64, a sequence at a time."""

    def score(path: Path) -> Tensor:
        ids = torch.tensor([path.tokens])
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.cat([patches for patches, _ in path.images]),
            image_grid_thw=torch.tensor([grid for _, grid in path.images]),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
        ).logits[0]
        chosen = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return torch.cat([chosen.new_zeros(1), chosen])

    return score


def reference_model() -> Any:
    return Qwen3VLForConditionalGeneration.from_pretrained(
        model_directory("mini"), dtype=torch.float64, attn_implementation="eager"
    ).eval()


def test_a_step_is_the_papers(agent: Agent):
    """Selection, credit, loss and the gradient of every weight, after the policy has moved away from who sampled."""
    seed = random.getrandbits(32)
    task = get_task("mini")
    asked = [(group, task.question("train", index)) for group, index in enumerate(QUESTIONS)]
    explored = explore(agent, 1, asked, len(asked), LIMITS, Algo(budget_ratio=RATIO), seed=0)
    groups = [[plain(rollout) for rollout in group] for group in explored.groups]

    policy, fixed = reference_model(), reference_model()
    tokenizer = agent.llm.processor.tokenizer
    names = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>")
    tags = Tags(*(tokenizer.convert_tokens_to_ids(name) for name in names))
    scored = torch.no_grad()(scorer(fixed))
    kept = prefixes(groups, tags, lambda path, a, b: scored(path)[a:b].exp().mean().item(), RATIO, 4)
    sources = {place: explored.groups[place[0]][place[1]] for place in kept}
    assert len({g for g, _ in kept}) < len(kept) == 3, "breadth first, then depth"
    assert {source.id for source in sources.values()} == set(explored.resamples)
    for place, source in sources.items():
        children = explored.resamples[source.id]
        assert len(children) == 4 and {child.fork_token for child in children} == {kept[place]}
        assert all(child.tokens[: kept[place]] == source.tokens[: kept[place]] for child in children)
    for group in explored.groups:
        for rollout in group:
            call = first_call(plain(rollout), tags)
            assert call == (None if rollout.first_call is None else (rollout.first_call.start, rollout.first_call.end))
    continuations = {place: [plain(c) for c in explored.resamples[source.id]] for place, source in sources.items()}

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((parameter + 0.2 * parameter.std() * noise).float())  # values that both can hold
    trained = credit(groups, kept, continuations)
    expected, ratios = loss(trained, scorer(policy), scored, low=0.2, high=0.4, beta=BETA)
    expected.backward()
    weights = dict(policy.named_parameters())
    assert sum(not 0.8 < ratio < 1.4 for ratio in ratios) > 0.01 * len(ratios), "some tokens are clipped"

    options = {"optim": Optim(grad_clip=0.0), "loss": Loss(kl_coef=BETA), "temperature": 1.0}
    learner = build_learner(model_directory("mini"), **options)
    mine = {name: parameter.to_local() for name, parameter in learner.model.named_parameters()}  # pyright: ignore[reportAttributeAccessIssue]
    for name, parameter in mine.items():
        parameter.data.copy_(weights[name])
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        for name, parameter in learner.model.named_parameters():
            assert parameter.grad is not None, name
            gradients[name] = parameter.grad.full_tensor().double()  # pyright: ignore[reportAttributeAccessIssue]

    learner.optimizer.register_step_pre_hook(keep)
    assign_credit(explored.groups, explored.resamples)
    image = policy.config.image_token_id
    trees = [tree for group in explored.groups for tree in build_trees(group, explored.resamples, image, budget=2048)]
    metrics = learner.step(pack_trees(trees, 2048))
    assert metrics["policy/trained_tokens"] == len(ratios)
    assert metrics["policy/loss"] == pytest.approx(expected.item(), rel=1e-4, abs=1e-5), f"seed {seed}"
    assert gradients.keys() == weights.keys()
    for name, gradient in gradients.items():
        right = weights[name].grad
        assert right is not None and (gradient - right).norm() < 1e-4 * right.norm(), f"{name}, seed {seed}"

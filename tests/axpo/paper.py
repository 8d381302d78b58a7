"""One step of AXPO in float64 from the paper's words (PAPER.md, "GRPO", "AXPO" 1–6) alone: lists, loops, no packing.

Nothing here comes from `axpo`, `engine` or `kernels`: log-probs are transformers', calls are found among the tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tags:
    """Token ids."""

    think: int
    think_end: int
    call: int
    call_end: int
    end_of_turn: int


@dataclass(frozen=True)
class Path:
    """A rollout or a continuation from its prompt on. sampled: of each token, whether the policy chose it."""

    tokens: list[int]
    sampled: list[bool]
    sampler_logprobs: list[float | None]
    reward: float
    images: list[tuple[Tensor, tuple[int, int, int]]]
    """Patches and grid of each."""


def first_call(path: Path, tags: Tags) -> tuple[int, int] | None:
    """From the opening tag of the first call to behind what closes it; a tag inside <think> is none."""
    thinking, start = False, None
    for i, token in enumerate(path.tokens):
        if start is not None:
            if token == tags.call_end or not path.sampled[i]:
                return start, i + path.sampled[i]
            if token in (tags.call, tags.end_of_turn):
                return start, i
        elif token in (tags.think, tags.think_end, tags.end_of_turn):
            thinking = token == tags.think
        elif token == tags.call and path.sampled[i] and not thinking:
            start = i
    return None if start is None else (start, len(path.tokens))


def normalised(rewards: list[float]) -> list[float]:
    deviation = stdev(rewards)
    return [(r - fmean(rewards)) / (deviation + 1e-6) if deviation else 0.0 for r in rewards]


def prefixes(
    groups: list[list[Path]], tags: Tags, confidence: Callable[[Path, int, int], float], ratio: float, k: int
) -> dict[tuple[int, int], int]:
    """(question, rollout) of each prefix to continue → how many tokens it keeps."""
    budget = math.floor(ratio * len(groups) * len(groups[0]) / k)
    ranked: list[list[tuple[float, int, int, int]]] = []
    for g, group in enumerate(groups):
        calls = [(i, call) for i, path in enumerate(group) if (call := first_call(path, tags))]
        if calls and all(group[i].reward == 0 for i, _ in calls):
            ranked.append(sorted((confidence(group[i], s + 1, e), g, i, s + 1) for i, (s, e) in calls))
    ranked.sort()
    breadth_first = [mine[d] for d in range(len(groups[0])) for mine in ranked if d < len(mine)]
    return {(g, i): kept for _, g, i, kept in breadth_first[:budget]}


def credit(
    groups: list[list[Path]],
    kept: dict[tuple[int, int], int],
    continuations: dict[tuple[int, int], list[Path]],
) -> list[tuple[Path, range, float]]:
    """Which stretch of which path is trained, and with which advantage."""
    out = []
    for g, group in enumerate(groups):
        rewards = [path.reward for path in group]
        for i, path in enumerate(group):
            if (g, i) not in kept:
                out.append((path, range(len(path.tokens)), normalised(rewards)[i]))
                continue
            at, children = kept[g, i], continuations[g, i]
            recovered = [*rewards[:i], max(child.reward for child in children), *rewards[i + 1 :]]
            out.append((path, range(at), normalised(recovered)[i]))
            for child, advantage in zip(children, normalised([c.reward for c in children]), strict=True):
                out.append((child, range(at, len(child.tokens)), advantage))
    return out


def loss(
    trained: list[tuple[Path, range, float]],
    policy: Callable[[Path], Tensor],
    reference: Callable[[Path], Tensor],
    *,
    low: float,
    high: float,
    beta: float,
) -> tuple[Tensor, list[float]]:
    """What is minimised, a mean over all trained tokens, and every token's ratio; the KL is estimated by k3."""
    total, ratios = torch.zeros((), dtype=torch.float64), []
    for path, stretch, advantage in trained:
        at = [t for t in stretch if path.sampled[t]]
        logprobs, fixed = policy(path)[at], reference(path)[at]
        ratio = (logprobs - torch.tensor([path.sampler_logprobs[t] for t in at])).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        difference = fixed - logprobs
        total = total + (beta * (difference.exp() - difference - 1) - surrogate).sum()
        ratios += ratio.tolist()
    return total / len(ratios), ratios

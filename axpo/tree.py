"""Packs rollouts and resamples depth-first: prompts, images and fork prefixes are computed once (DESIGN.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from axpo.trajectory import Trajectory

Aggregation = Literal["token", "sequence", "constant"]
Resamples = Mapping[str, Sequence[Trajectory]]
"""Source rollout id → its continuations."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One or more trees in one row: T tokens that are computed, M tokens that are trained, I images.

    input_ids [T] int64; position_ids [3, T] int64 (mrope, from the trajectory, never re-derived).
    prev [T] int32: packed index of the token before t on its path, −1 at a root.
    subtree_end [T] int32: token t is visible to query i iff t <= i < subtree_end[t].
    predict_index [M] int64: the packed token that predicts trained token m, whose id is labels[m] int64. Trained
    tokens from which nothing is predicted are labels only and are not in the row.
    old_logprobs (NaN where the sampler gave none), advantages, weights [M] fp32.
    sequence [M] int64: which trajectory trains the token, counted from 0 in the row. A resampled source owns its kept
    prefix, a continuation what lies behind it: no token has two owners, and no owner's tokens are in two rows.
    images: engine.processor.ImageInput in packed order; image_token_index [Σ num_tokens] int64: their packed tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    prev: Tensor
    subtree_end: Tensor
    predict_index: Tensor
    labels: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    sequence: Tensor
    image_token_index: Tensor
    images: tuple[Any, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_sequences(self) -> int:
        """Trajectories that train a token at a weight above 0."""
        return self.sequence[self.weights > 0].unique().numel()

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with its index and value tensors on `device`; images move when they are encoded."""
        names = (name for name in self.__slots__ if name != "images")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def build_trees(
    rollouts: Sequence[Trajectory],
    resamples: Resamples,
    image_token_id: int | None,
    *,
    aggregation: Aggregation = "token",
    budget: int | None = None,
) -> list[PackedBatch]:
    """The question's tree: prompt → rollouts → continuations below the kept prefix of their source.

    What no trained token depends on is left out: masked suffixes, untrained rollouts, the last token of a path. A tree
    above `budget` tokens is split by rollouts, each part with the prompt again; one rollout with its resamples stays
    whole. Empty when nothing is trained. For SFT: one rollout without resamples is a plain sequence.

    Raises:
        ValueError: the rollouts have different prompts, or a trajectory's images do not fit its image tokens.
    """
    trained = [rollout for rollout in rollouts if any(rollout.loss_mask) or _forks(rollout, resamples)]
    if not trained:
        return []
    writer = _Writer(image_token_id, aggregation)
    writer.question(trained, resamples)
    if budget is None or len(writer.tokens) <= budget or len(trained) == 1:
        return [writer.batch()]
    halves = trained[: len(trained) // 2], trained[len(trained) // 2 :]
    split = [build_trees(half, resamples, image_token_id, aggregation=aggregation, budget=budget) for half in halves]
    return split[0] + split[1]


def with_labels(tree: PackedBatch, labels: Sequence[tuple[int, int]], weight: float) -> PackedBatch:
    """The tree of a plain sequence with further targets: packed token `index` also predicts `label`, at this weight."""
    index, label = (torch.tensor(column, dtype=torch.int64) for column in zip(*labels, strict=True))
    inside = index < tree.num_tokens
    index, label = index[inside], label[inside]
    zero = torch.zeros(len(index))
    return replace(
        tree,
        predict_index=torch.cat([tree.predict_index, index]),
        labels=torch.cat([tree.labels, label]),
        old_logprobs=torch.cat([tree.old_logprobs, zero + float("nan")]),
        advantages=torch.cat([tree.advantages, zero]),
        weights=torch.cat([tree.weights, zero + weight]),
        sequence=torch.cat([tree.sequence, torch.zeros_like(index)]),
    )


def concatenate(trees: Sequence[PackedBatch]) -> PackedBatch:
    """The trees one after another in one row, indices shifted."""
    offsets = np.cumsum([0, *(tree.num_tokens for tree in trees)]).tolist()

    def cat(name: str, shift: bool = False) -> Tensor:
        parts = [getattr(tree, name) for tree in trees]
        return torch.cat([part + offset for part, offset in zip(parts, offsets, strict=False)] if shift else parts)

    prev = cat("prev", shift=True)
    prev[torch.cat([tree.prev for tree in trees]) < 0] = -1
    owners = np.cumsum([0, *(int(tree.sequence.max()) + 1 for tree in trees)]).tolist()
    return PackedBatch(
        input_ids=cat("input_ids"),
        position_ids=torch.cat([tree.position_ids for tree in trees], dim=1),
        prev=prev,
        subtree_end=cat("subtree_end", shift=True),
        predict_index=cat("predict_index", shift=True),
        labels=cat("labels"),
        old_logprobs=cat("old_logprobs"),
        advantages=cat("advantages"),
        weights=cat("weights"),
        sequence=torch.cat([tree.sequence + owner for tree, owner in zip(trees, owners, strict=False)]),
        image_token_index=cat("image_token_index", shift=True),
        images=tuple(image for tree in trees for image in tree.images),
    )


def _last_trained(trajectory: Trajectory) -> int:
    """Index of the last trained token: what must be computed of a path ends before it. 0 when nothing is trained."""
    return next((i for i in range(len(trajectory.tokens) - 1, 0, -1) if trajectory.loss_mask[i]), 0)


def _forks(trajectory: Trajectory, resamples: Resamples) -> list[tuple[int, list[Trajectory]]]:
    """The trained continuations of a trajectory by the token at which they leave it, in token order."""
    children = [child for child in resamples.get(trajectory.id, ()) if any(child.loss_mask)]
    at = sorted({child.fork_token or 0 for child in children})
    return [(fork, [child for child in children if child.fork_token == fork]) for fork in at]


@dataclass(slots=True)
class _Writer:
    """Writes one question's tree depth-first; a segment is a stretch of one trajectory without a fork inside."""

    image_token_id: int | None
    aggregation: Aggregation
    tokens: list[int] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    prev: list[int] = field(default_factory=list)
    subtree_end: list[int] = field(default_factory=list)
    trained: list[tuple[int, int, float, float, float, int]] = field(default_factory=list)
    owners: dict[str, int] = field(default_factory=dict)
    images: list[Any] = field(default_factory=list)
    image_tokens: list[np.ndarray] = field(default_factory=list)

    def question(self, rollouts: Sequence[Trajectory], resamples: Resamples) -> None:
        first = rollouts[0]
        prompt = first.tokens[: first.prompt_len]
        for rollout in rollouts:
            if rollout.tokens[: rollout.prompt_len] != prompt:
                raise ValueError(f"rollouts {first.id} and {rollout.id} of one question have different prompts")
            if any(rollout.loss_mask[: rollout.prompt_len]):
                raise ValueError(f"trajectory {rollout.id}: a prompt token is marked as trained")
        last = self.segment(first, 0, first.prompt_len, before=-1)
        for rollout in rollouts:
            self.path(rollout, rollout.prompt_len, last, resamples)
        self.close(0, first.prompt_len)

    def path(self, trajectory: Trajectory, start: int, before: int, resamples: Resamples) -> None:
        """The trajectory from token `start`, which follows packed token `before`, with everything forked from it."""
        open_runs = []
        for fork, children in _forks(trajectory, resamples):
            open_runs.append((len(self.tokens), fork - start))
            start, before = fork, self.segment(trajectory, start, fork, before)
            for child in children:
                self.path(child, fork, before, resamples)
        self.segment(trajectory, start, max(start, _last_trained(trajectory)), before, ends=True)
        for run in open_runs:
            self.close(*run)

    def segment(self, trajectory: Trajectory, start: int, end: int, before: int, ends: bool = False) -> int:
        """Appends tokens [start, end) and returns the packed index of the last one.

        Where the path `ends`, token `end` is still trained: it is predicted from here and computed nowhere.
        """
        if trajectory.positions is None:
            raise ValueError(f"trajectory {trajectory.id}: no positions; they are not kept in trajectory files")
        first = len(self.tokens)
        previous = [before, *range(first, first + end - start)]
        weight = 1.0 / max(sum(trajectory.loss_mask), 1) if self.aggregation == "sequence" else 1.0
        for i in range(start, min(end + ends, len(trajectory.tokens))):
            if trajectory.loss_mask[i]:
                logprob = trajectory.logprobs[i]
                old = float("nan") if logprob is None else logprob
                owner = self.owners.setdefault(trajectory.id, len(self.owners))
                token, advantage = trajectory.tokens[i], trajectory.advantages[i]
                self.trained.append((previous[i - start], token, old, advantage, weight, owner))
        self.place_images(trajectory, start, end)
        self.tokens += trajectory.tokens[start:end]
        self.positions.append(trajectory.positions[:, start:end])
        self.prev += previous[:-1]
        self.subtree_end += [first + end - start] * (end - start)
        return previous[-1]

    def close(self, first: int, count: int) -> None:
        """Everything written since belongs to the subtree of this run."""
        self.subtree_end[first : first + count] = [len(self.tokens)] * count

    def place_images(self, trajectory: Trajectory, start: int, end: int) -> None:
        """The images whose tokens lie in [start, end) of the trajectory."""
        pads = np.flatnonzero(np.asarray(trajectory.tokens) == self.image_token_id)
        stops = np.cumsum([0, *(image.num_tokens for image in trajectory.images)])
        if stops[-1] != len(pads):
            raise ValueError(f"trajectory {trajectory.id}: {len(pads)} image tokens for images of {stops[-1]} tokens")
        for image, a, b in zip(trajectory.images, stops, stops[1:], strict=False):
            if start <= pads[a] < end:
                self.images.append(image)
                self.image_tokens.append(pads[a:b] - start + len(self.tokens))

    def batch(self) -> PackedBatch:
        predictor, labels, old_logprobs, advantages, weights, sequence = zip(*self.trained, strict=True)
        image_tokens = np.concatenate([np.zeros(0, np.int64), *self.image_tokens])
        return PackedBatch(
            input_ids=torch.tensor(self.tokens, dtype=torch.int64),
            position_ids=torch.from_numpy(np.concatenate(self.positions, axis=1, dtype=np.int64)),
            prev=torch.tensor(self.prev, dtype=torch.int32),
            subtree_end=torch.tensor(self.subtree_end, dtype=torch.int32),
            predict_index=torch.tensor(predictor, dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            old_logprobs=torch.tensor(old_logprobs, dtype=torch.float32),
            advantages=torch.tensor(advantages, dtype=torch.float32),
            weights=torch.tensor(weights, dtype=torch.float32),
            sequence=torch.tensor(sequence, dtype=torch.int64),
            image_token_index=torch.from_numpy(image_tokens),
            images=tuple(self.images),
        )

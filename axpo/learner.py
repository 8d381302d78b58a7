"""The trainer: an FSDP2-sharded policy, its fixed reference, and one AdamW update a step over packed trees."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from axpo.config import Train
from axpo.distributed import all_reduce, gather_columns, world_size
from axpo.flops import training_flops
from axpo.loss import kl_divergence, mismatch_metrics, policy_loss, policy_metrics
from axpo.optimizer import make_optimizer
from axpo.sharding import (
    build_model,
    copy_shards,
    draw_weights,
    global_norm,
    load_sharded,
    reduce_over_replicas,
    reshard,
)
from axpo.tree import PackedBatch, concatenate
from engine.images import ImageInput
from engine.models import ModelConfig, Predict, Qwen3VL, VisionInput
from kernels import tree_attention

if TYPE_CHECKING:
    from axpo.config import Loss, Optim

TokenLoss = Callable[[PackedBatch, Tensor, Tensor | None], Tensor]
"""(batch, logprobs [M], reference logprobs [M] or None) -> weighted sum of the token losses."""


class NonFiniteError(FloatingPointError):
    """The loss or the gradient of an update is NaN or infinite; the weights were not changed."""


class Learner:
    """Owns the trained weights (fp32 masters, sharded over all ranks), the optimizer and the reference policy.

    Every rank makes the same calls in the same order; batches differ, and a rank may have none.

    Args:
        path: Hugging Face checkpoint directory of the policy's first weights, which the reference policy keeps.
        dtype: compute dtype; gradients are reduced in fp32.
        total_steps: where a decaying learning-rate schedule ends.
        loss: the policy loss; None for a learner that only makes `sft_step`s.
        temperature: the sampling temperature, at which log-probs are scored.
        scratch_seed: draw fresh weights from this seed instead of reading them.
        train: how model, activations and optimizer are spread over memory; none of it changes what is computed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        optim: "Optim",
        total_steps: int,
        loss: "Loss | None" = None,
        temperature: float = 1.0,
        scratch_seed: int | None = None,
        train: Train | None = None,
    ):
        self.train = train = train or Train()
        self.config = ModelConfig.from_pretrained(path)
        self.device = device
        self.optim = optim
        self.total_steps = total_steps
        self.loss = loss
        self.temperature = temperature
        self.updates = 0
        build = partial(build_model, self.config, dtype, device, replicas=train.replicas)
        self.model = build(checkpointing=train.activation_checkpointing, freeze_vision=train.freeze_vision)
        if scratch_seed is None:
            load_sharded(self.model, path)
        else:
            draw_weights(self.model, scratch_seed)
        self.reference = None
        if loss is not None and loss.kl_coef > 0:
            self.reference = build(trained=False, offload=train.reference_offload)
            copy_shards(self.model, self.reference)
        self.optimizer = make_optimizer(self.model, optim, offload=train.optimizer_offload)

    def flops(self, batch: PackedBatch) -> float:
        """Operations of an update on the batch, without the reference policy's."""
        return training_flops(self.config, batch, freeze_vision=self.train.freeze_vision)

    def step(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """One policy update over the rank's share of the step (PAPER.md, "GRPO" and "AXPO" 6).

        Raises:
            ValueError: a trained token has no sampler log-prob, or no rank has a trained token.
            NonFiniteError: loss or gradient is not finite; nothing was changed.
        """
        loss = self.loss
        if loss is None:
            raise ValueError("this learner was built without a policy loss; it can only make sft_step")
        if any(batch.old_logprobs.isnan().any() for batch in batches):
            raise ValueError("a trained token has no log-prob of the sampler; only sampled tokens can be trained on")

        def token_loss(batch: PackedBatch, logprobs: Tensor, reference: Tensor | None) -> Tensor:
            return policy_loss(
                logprobs,
                batch.old_logprobs,
                batch.advantages,
                batch.weights,
                clip_low=loss.clip_low,
                clip_high=loss.clip_high,
                kl_coef=loss.kl_coef,
                ref_logprobs=reference,
            )

        metrics, columns = self._update(batches, token_loss)
        logprobs, old_logprobs, advantages, entropies, reference = columns
        metrics |= policy_metrics(logprobs, old_logprobs, advantages, entropies, loss.clip_low, loss.clip_high)
        metrics |= mismatch_metrics(logprobs, old_logprobs)
        if self.reference is not None:
            metrics["policy/kl"] = kl_divergence(logprobs, reference).double().mean().item()
        return metrics

    def sft_step(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """One step of weighted cross entropy, −Σ w·logprob / Σ w, on teacher trajectories. Raises as `step`."""
        metrics, (_, _, _, entropies, _) = self._update(batches, lambda batch, lp, _: -(lp * batch.weights).sum())
        return metrics | {"policy/entropy": entropies.double().mean().item()}

    def _update(self, batches: Sequence[PackedBatch], token_loss: TokenLoss) -> tuple[dict[str, float], Tensor]:
        """Accumulates gradients over all micro-batches with one global denominator, then clips and steps.

        Returns metrics and the trained tokens of all ranks, [5, M]: logprobs, old logprobs, advantages, entropies,
        reference logprobs.
        """
        weight = all_reduce(sum(batch.weights.double().sum().item() for batch in batches), self.device)
        if weight == 0:
            raise ValueError("no rank has a trained token in this step")
        total, columns = 0.0, []
        for batch in self._equal_rounds(batches):
            reference = self._reference_logprobs(batch)
            logprobs, entropies = score(self.model, batch, self.temperature)
            summed = token_loss(batch, logprobs, reference)
            # FSDP averages gradients over ranks; the sum is wanted, since `weight` already counts all ranks.
            (summed * (world_size() / weight)).backward()
            total += summed.item()
            columns.append(_detach_trained(batch, logprobs, entropies, reference))
        loss = all_reduce(total, self.device) / weight
        metrics = {"policy/loss": loss} | self._apply(loss)
        return metrics, gather_columns(torch.cat(columns, dim=1))

    def _apply(self, loss: float) -> dict[str, float]:
        """Clips the accumulated gradient to its global norm and makes the update, unless something is not finite."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = global_norm(gradients)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            raise NonFiniteError(
                f"update {self.updates + 1}: loss {loss}, gradient norm {norm}; the weights were not changed. "
                "Lower optim.lr, or look at the step's trajectories for extreme log-probs"
            )
        if 0 < self.optim.grad_clip < norm:
            for gradient in gradients:
                gradient.mul_(self.optim.grad_clip / (norm + 1e-6))
        rate = learning_rate(self.updates, self.optim, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return {"policy/grad_norm": norm, "policy/lr": rate}

    def _equal_rounds(self, batches: Sequence[PackedBatch]) -> Iterator[PackedBatch]:
        """The rank's micro-batches, filled up to the largest count of any rank, since FSDP needs all of them in step.

        For the same reason each of them has an image if the model can see. Replicas sum their gradients once, in the
        last round; until then each adds up its own.
        """
        rounds = int(all_reduce(len(batches), self.device, dist.ReduceOp.MAX))
        filler = placeholder(self.config)
        for index in range(rounds):
            batch = batches[index] if index < len(batches) else filler
            if self.config.vision is not None and not batch.images:
                batch = concatenate([batch, filler])
            reduce_over_replicas(self.model, index == rounds - 1)
            yield batch.to(self.device)

    @torch.no_grad()
    def _reference_logprobs(self, batch: PackedBatch) -> Tensor | None:
        if self.reference is None:
            return None
        logprobs, _ = score(self.reference, batch, self.temperature)
        reshard(self.reference)
        return logprobs


def score(model: Qwen3VL, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) of the batch's trained tokens, [M] fp32, in one pass over its trees."""
    scale = model.config.text.head_dim**-0.5

    def attention(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tree_attention(q, k, v, batch.subtree_end, scale)

    vision = None
    if batch.images:
        pixels = torch.cat([image.pixel_values for image in batch.images]).to(batch.input_ids.device)
        grids = torch.tensor([image.grid_thw for image in batch.images])
        vision = VisionInput(pixels, grids, batch.image_token_index)
    predict = Predict(batch.predict_index, batch.labels, temperature)
    return model(batch.input_ids, batch.position_ids, attention, vision, predict)


def learning_rate(update: int, optim: "Optim", total_steps: int) -> float:
    """Of update 0, 1, …: linear warm-up to `optim.lr`, then constant, or down to 0 at `total_steps`."""
    warmup = min(1.0, (update + 1) / max(1, optim.warmup_steps))
    progress = min(1.0, max(0, update - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return optim.lr * warmup * decay[optim.schedule]


def placeholder(config: ModelConfig) -> PackedBatch:
    """One token that trains nothing (weight 0), on a blank image if the model can see."""
    images = ()
    if config.vision is not None:
        merge = config.vision.spatial_merge_size
        images = (ImageInput(torch.zeros(merge**2, config.vision.patch_dim), (1, merge, merge), 1, b""),)
    zero, none = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    return PackedBatch(
        input_ids=zero + (config.image_token_id or 0),
        position_ids=zero.expand(3, 1),
        prev=torch.tensor([-1], dtype=torch.int32),
        subtree_end=torch.tensor([1], dtype=torch.int32),
        predict_index=zero,
        labels=zero,
        old_logprobs=none,
        advantages=none,
        weights=none,
        image_token_index=zero[: len(images)],
        images=images,
    )


def _detach_trained(batch: PackedBatch, logprobs: Tensor, entropies: Tensor, reference: Tensor | None) -> Tensor:
    """[5, M] of the tokens that count, without the placeholder's."""
    reference = torch.zeros_like(logprobs) if reference is None else reference
    columns = torch.stack([logprobs.detach(), batch.old_logprobs, batch.advantages, entropies.detach(), reference])
    return columns[:, batch.weights > 0]

"""The trainer: an FSDP2-sharded policy, its fixed reference, and the AdamW updates of a step over packed trees."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from axpo.config import Train
from axpo.distributed import all_reduce, gather_columns, world_size
from axpo.flops import training_flops
from axpo.loss import Tokens, metric_columns, mismatch_metrics, policy_loss, update_metrics
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
    from axpo.config import Loss, Optim, Train


@dataclass(frozen=True, slots=True)
class Minibatch:
    """A rank's share of one update: packed rows, and each row's log-probs of π_old where they are not the sampler's."""

    rows: Sequence[PackedBatch]
    old_logprobs: Sequence[Tensor] | None = None


class NonFiniteError(FloatingPointError):
    """An update met NaN or infinity; the weights stand as they were before it. `minibatch` is what it was made on."""

    def __init__(self, message: str, minibatch: Minibatch):
        super().__init__(message)
        self.minibatch = minibatch


class Learner:
    """Owns the trained weights (fp32 masters, sharded over all ranks), the optimizer and the reference policy.

    Every rank makes the same calls in the same order; batches differ, and a rank may have none.

    Args:
        path: Hugging Face checkpoint directory of the policy's first weights, which the reference policy keeps.
        dtype: compute dtype; gradients are reduced in fp32.
        total_steps: where a decaying learning-rate schedule ends.
        loss: the policy loss; None for a learner that only makes `sft_step`s.
        temperature: the sampling temperature, at which log-probs are scored.
        max_new_tokens: the constant length of `loss.aggregation = "constant"`.
        scratch_seed: draw fresh weights from this seed instead of reading them.
        train: how model, activations and optimizer are spread over memory, and how many updates a step makes.
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
        max_new_tokens: int = 1,
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
        self.max_new_tokens = max_new_tokens
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

    def step(self, *minibatches: Sequence[PackedBatch]) -> dict[str, float]:
        """The policy updates of a step, over the rank's share of it (PAPER.md, "GRPO" and "AXPO" 6).

        One update a minibatch, and over again up to `train.updates_per_batch`; a minibatch in which no rank has a
        trained token is passed over. The only update of a step is taken against the policy that sampled, by the
        sampler's own log-probs; for several, π_old is scored once before the first.

        Raises:
            NonFiniteError: loss, gradient or a log-prob of the sampler is not finite; that update was not made.
        """
        loss = self.loss
        if loss is None:
            raise ValueError("this learner was built without a policy loss; it can only make sft_step")
        parts = [Minibatch(rows) for rows in minibatches if self._trains(rows)]
        for part in parts:
            self._check_sampled(part)
        metrics: dict[str, float] = {}
        if parts and self.train.updates_per_batch > 1:
            parts = [self._score_old(part) for part in parts]
            metrics = mismatch_metrics(*self._old_and_sampled(parts))
        updates, columns = [], []
        for part in parts * (self.train.updates_per_batch // len(minibatches)):
            numbers, seen = self._update(part, partial(policy_loss, loss=loss))
            updates.append(numbers)
            columns += [metric_columns(tokens, loss) for tokens in seen]
        if not updates:
            return {"policy/updates": 0.0}
        everyone = gather_columns(torch.cat(columns, dim=1))
        metrics = metrics or mismatch_metrics(everyone[0], everyone[1])
        means = {name: sum(numbers[name] for numbers in updates) / len(updates) for name in updates[0]}
        return means | {"policy/updates": float(len(updates))} | update_metrics(everyone, loss) | metrics

    def sft_step(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """One step of weighted cross entropy, −Σ w·logprob / Σ w, on teacher trajectories.

        Raises:
            ValueError: no rank has a trained token.
            NonFiniteError: loss or gradient is not finite; nothing was changed.
        """
        if not self._trains(batches):
            raise ValueError("no rank has a trained token in this step")
        metrics, rows = self._update(Minibatch(batches), lambda tokens: -(tokens.logprobs * tokens.weights).sum())
        entropies = torch.cat([tokens.entropies[tokens.weights > 0] for tokens in rows])
        return metrics | {"policy/entropy": gather_columns(entropies[None]).double().mean().item()}

    @torch.no_grad()
    def sft_loss(self, batches: Sequence[PackedBatch]) -> float:
        """What `sft_step` would minimise, over all ranks. ValueError: no rank has a trained token."""
        if not self._trains(batches):
            raise ValueError("no rank has a trained token in these rows")
        denominator = all_reduce(self._denominator(batches), self.device)
        total = 0.0
        for batch in self._equal_rounds(batches):
            logprobs, _ = score(self.model, batch, self.temperature)
            total -= (logprobs * batch.weights).sum().item()
        reshard(self.model)
        return all_reduce(total, self.device) / denominator

    def replay(self, minibatch: Minibatch) -> None:
        """Makes again the update that `minibatch` was kept from; raises NonFiniteError as it did."""
        assert self.loss is not None
        self._update(minibatch, partial(policy_loss, loss=self.loss))

    def _update(
        self, minibatch: Minibatch, objective: Callable[[Tokens], Tensor]
    ) -> tuple[dict[str, float], list[Tokens]]:
        """Accumulates gradients over all micro-batches with one global denominator, then clips and steps.

        Returns metrics and the rank's trained tokens, row by row.
        """
        denominator = all_reduce(self._denominator(minibatch.rows), self.device)
        total, seen = 0.0, []
        for index, batch in enumerate(self._equal_rounds(minibatch.rows)):
            reference = self._reference_logprobs(batch)
            logprobs, entropies = score(self.model, batch, self.temperature)
            tokens = Tokens(
                logprobs,
                entropies,
                self._old_logprobs(minibatch, index, batch, logprobs),
                batch.old_logprobs,
                batch.advantages,
                batch.weights,
                batch.sequence,
                reference,
            )
            summed = objective(tokens)
            # FSDP averages gradients over ranks; the sum is wanted, since the denominator already counts all ranks.
            (summed * (world_size() / denominator)).backward()
            total += summed.item()
            seen.append(tokens.detach())
        loss = all_reduce(total, self.device) / denominator
        return {"policy/loss": loss} | self._apply(loss, minibatch), seen

    def _denominator(self, rows: Sequence[PackedBatch]) -> float:
        """This rank's part of what the summed loss is divided by."""
        if self.loss is not None and self.loss.aggregation == "constant":
            return float(sum(row.num_sequences for row in rows) * self.max_new_tokens)
        return sum(row.weights.double().sum().item() for row in rows)

    def _old_logprobs(self, minibatch: Minibatch, index: int, batch: PackedBatch, logprobs: Tensor) -> Tensor:
        """π_old of the index-th round, whose `batch` may end in a placeholder."""
        if minibatch.old_logprobs is not None:
            old = minibatch.old_logprobs[index] if index < len(minibatch.old_logprobs) else logprobs.new_zeros(0)
            return F.pad(old.to(self.device), (0, len(logprobs) - len(old)))
        if self.loss is not None and self.loss.tis != "off":
            return logprobs.detach()  # this is the only update, so the policy is π_old; w corrects for the sampler
        return batch.old_logprobs

    @torch.no_grad()
    def _score_old(self, minibatch: Minibatch) -> Minibatch:
        scores = [score(self.model, batch, self.temperature)[0] for batch in self._equal_rounds(minibatch.rows)]
        reshard(self.model)
        lengths = [len(row.labels) for row in minibatch.rows]
        return replace(minibatch, old_logprobs=[old[:n] for old, n in zip(scores, lengths, strict=False)])

    def _old_and_sampled(self, parts: Sequence[Minibatch]) -> Tensor:
        """[2, M]: log-probs of trainer and sampler under the weights that sampled, on all ranks."""
        none = torch.zeros(0, device=self.device)
        old = [scored for part in parts for scored in part.old_logprobs or ()]
        sampled = [row.old_logprobs.to(self.device) for part in parts for row in part.rows]
        return gather_columns(torch.stack([torch.cat([none, *old]), torch.cat([none, *sampled])]))

    def _trains(self, rows: Sequence[PackedBatch]) -> bool:
        """Whether any rank has a trained token in its rows."""
        return all_reduce(float(sum(row.num_sequences for row in rows)), self.device) > 0

    def _check_sampled(self, minibatch: Minibatch) -> None:
        bad = any(not row.old_logprobs.isfinite().all() for row in minibatch.rows)
        if all_reduce(float(bad), self.device):
            raise NonFiniteError(
                f"update {self.updates + 1}: a trained token has no finite log-prob of the sampler: only sampled "
                "tokens can be trained on, and weights that are not finite sample nothing",
                minibatch,
            )

    def _apply(self, loss: float, minibatch: Minibatch) -> dict[str, float]:
        """Clips the accumulated gradient to its global norm and makes the update, unless something is not finite."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = global_norm(gradients)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            bad = self._non_finite_gradients()
            self.optimizer.zero_grad()
            raise NonFiniteError(
                f"update {self.updates + 1}: loss {loss}, gradient norm {norm}"
                f"{f' ({len(bad)} gradients, the last of them {bad[-1]})' if bad else ''}; the weights were not "
                "changed. Lower optim.lr, or look at the step's trajectories for extreme log-probs",
                minibatch,
            )
        if 0 < self.optim.grad_clip < norm:
            for gradient in gradients:
                gradient.mul_(self.optim.grad_clip / (norm + 1e-6))
        rate = learning_rate(self.updates // self.train.updates_per_batch, self.optim, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return {"policy/grad_norm": norm, "policy/lr": rate}

    def _non_finite_gradients(self) -> list[str]:
        """Parameters in the order of the model; the backward pass reached the last of them first."""
        named = [(name, parameter.grad) for name, parameter in self.model.named_parameters()]
        return [name for name, grad in named if grad is not None and not math.isfinite(global_norm([grad]))]

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


def learning_rate(step: int, optim: "Optim", total_steps: int) -> float:
    """Of step 0, 1, …: linear warm-up to `optim.lr`, then constant, or down to 0 at `total_steps`."""
    warmup = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    progress = min(1.0, max(0, step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
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
        sequence=zero,
        image_token_index=zero[: len(images)],
        images=images,
    )

"""Sampling a batch of tokens with counter-based noise, together with log-probability and exact entropy."""

import torch

from kernels._library import LOADED, choose
from kernels.sampling.linear import linear_sample, linear_sample_reference
from kernels.sampling.reference import gumbel_noise, philox4x32, sample_reference, truncate

__all__ = [
    "gumbel_noise",
    "linear_sample",
    "linear_sample_reference",
    "philox4x32",
    "sample",
    "sample_reference",
    "truncate",
]


def sample(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    banned: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token a row, by Gumbel-max: argmax of logits / temperature + noise(seed, position, token) over what is left.

    logits: [B, V] fp32; seeds (read as uint64), positions: [B] int64; temperature: [B] fp32, 0 = greedy;
    top_k: [B] int64, 0 = off; top_p: [B] fp32, 1 = off; banned: [n] int64 ids that are never sampled, or None;
    min_p: [B] fp32, 0 = off, or None; backend: "triton", "cpp" or "reference", see kernels._library.choose.
    Returns (token [B] int64, logprob [B] fp32, entropy [B] fp32).

    Order (vLLM's): banned ids leave first, then tokens less probable than min_p times the most probable one left, then
    top_k (all that tie with the k-th stay), then top_p (the smallest set of the most probable remaining tokens that
    holds at least top_p of their mass; never empty; of equal ones the lowest ids first). Ties go to the lowest id.
    logprob and entropy, in nats, are of softmax(logits / temperature) over all of V, before anything is removed (of
    softmax(logits) when greedy): what a trainer can recompute from the model alone.
    A row's result depends on that row's arguments only. Raises ValueError for a row without a distribution (NaN, +inf,
    only -inf), without a token left, a negative temperature, a min_p outside [0, 1], or a banned id outside [0, V).
    The Triton form never waits for the device, so it raises nothing: such a row's token is -1 and its logprob NaN.
    """
    chosen = choose("sample", backend, logits, temperature, top_p, min_p, triton=logits.dtype == torch.float32)
    arguments = (logits, seeds, positions, temperature, top_k, top_p, banned, min_p)
    if chosen == "cpp":
        return torch.ops.axpo.sample.default(*arguments)
    if chosen == "triton":
        from kernels.sampling.triton import sample as sample_triton

        return sample_triton(*arguments)
    return sample_reference(*arguments)


if LOADED:

    @torch.library.register_fake("axpo::sample")
    def _(logits, seeds, positions, temperature, top_k, top_p, banned=None, min_p=None):
        return torch.empty_like(seeds), logits.new_empty(logits.shape[:1]), logits.new_empty(logits.shape[:1])

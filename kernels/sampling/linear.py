"""The LM head fused with the sampler: token, log-probability and entropy from the hidden states in one pass."""

import torch

from kernels._library import use_cpp
from kernels.linear_logprob_entropy import chunked
from kernels.linear_logprob_entropy.dispatch import implementation
from kernels.linear_logprob_entropy.state import accumulator
from kernels.sampling.reference import sample_reference

# Rows whose logits exist at a time where they have to: 78 MB for Qwen3's vocabulary.
ROWS = 128


def linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    banned: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sample(hidden @ weight.T, …) without top-k, top-p and min-p, and on a GPU without the logits in memory.

    hidden: [B, H]; weight: [V, H]; seeds, positions: [B] int64; temperature: [B] fp32, 0 = greedy; banned: [n] int64
    ids that are never sampled, or None. Logits are fp32 whatever the inputs' dtype, and the sums behind logprob and
    entropy are those of linear_logprob_entropy. Returns (token [B] int64, logprob [B] fp32, entropy [B] fp32).
    Raises what sample raises, and ValueError for shapes that disagree.
    """
    rows = hidden.shape[:1]
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_sample: hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [B, H], [V, H]"
        )
    for name, x in (("seeds", seeds), ("positions", positions), ("temperature", temperature)):
        if x.shape != rows:
            raise ValueError(
                f"linear_sample: {name} {list(x.shape)} must hold one entry for each of the {rows[0]} rows"
            )
    chosen = implementation("linear_sample", backend, hidden, weight)
    if chosen == "triton":
        from kernels.sampling.triton import linear_sample as fused

        return fused(hidden, weight, seeds, positions, temperature, banned)
    return _by_rows(hidden, weight, (seeds, positions, temperature), banned, chosen == "reference")


def _by_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    per_row: tuple[torch.Tensor, ...],
    banned: torch.Tensor | None,
    reference: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of ROWS rows at a time, by the products that linear_logprob_entropy makes, then sample."""
    n, dtype, width = len(hidden), accumulator(hidden), chunked.VOCAB_CHUNK
    hidden = chunked.pad(hidden, chunked.MIN_ROWS - n).to(dtype)
    logits = hidden.new_empty((len(hidden), len(weight)))
    for first in range(0, len(weight), width):
        columns = weight[first : first + width].to(dtype)
        torch.mm(hidden, columns.T, out=logits[:, first : first + width])
    logits = logits[:n].float()
    off = torch.zeros_like(per_row[0]), torch.ones_like(per_row[2])
    f = torch.ops.axpo.sample.default if use_cpp(logits) and not reference else sample_reference
    return f(logits, *per_row, *off, banned)

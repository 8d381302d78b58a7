"""The LM head fused with the sampler: token, log-probability and entropy from the hidden states in one pass."""

import torch

from kernels._library import use_cpp
from kernels.linear_logprob_entropy.dispatch import implementation
from kernels.linear_logprob_entropy.state import accumulator
from kernels.sampling.reference import sample_reference

# Rows whose logits exist at a time where they have to, and vocabulary columns of a matrix product. Fewer rows are
# padded to as many: BLAS libraries choose the order of a sum by the shape, which must not depend on the batch.
ROWS, COLUMNS = 32, 4096


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
    if chosen == "reference":
        return linear_sample_reference(hidden, weight, seeds, positions, temperature, banned)
    if chosen == "triton":
        from kernels.sampling.triton import linear_sample as fused

        return fused(hidden, weight, seeds, positions, temperature, banned)
    results = []
    for i in range(0, max(len(hidden), 1), ROWS):
        part = slice(i, i + ROWS)
        rows = seeds[part], positions[part], temperature[part]
        results.append(_of_chunked_logits(hidden[part], weight, *rows, banned))
    token, logprob, entropy = (torch.cat(column) for column in zip(*results, strict=True))
    return token, logprob, entropy


def linear_sample_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    banned: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """linear_sample with all logits in memory, in plain torch."""
    dtype = accumulator(hidden)
    logits = (hidden.to(dtype) @ weight.to(dtype).T).float()
    return sample_reference(
        logits, seeds, positions, temperature, torch.zeros_like(seeds), torch.ones_like(temperature), banned
    )


def _of_chunked_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    banned: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits by the products that linear_logprob_entropy makes, then sample."""
    n, dtype = len(hidden), accumulator(hidden)
    padded = torch.zeros(ROWS, hidden.shape[1], dtype=dtype, device=hidden.device)
    padded[:n] = hidden
    parts = [padded @ part.to(dtype).T for part in weight.split(COLUMNS)]
    logits = torch.cat(parts, dim=1)[:n].float()
    top_k, top_p = torch.zeros_like(seeds), torch.ones_like(temperature)
    f = torch.ops.axpo.sample.default if use_cpp(logits) else sample_reference
    return f(logits, seeds, positions, temperature, top_k, top_p, banned, None)

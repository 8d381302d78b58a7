"""The LM head fused with the sampler: token, log-probability and entropy from the hidden states in one pass."""

import torch

from kernels._library import FP32_BF16, LOADED, choose
from kernels.linear_logprob_entropy.dispatch import TRITON_DTYPES
from kernels.linear_logprob_entropy.state import accumulator
from kernels.sampling.reference import sample_reference


def linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    banned: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sample(hidden @ weight.T, …) without top-k, top-p and min-p, and without the logits in memory.

    hidden: [B, H]; weight: [V, H]; seeds, positions: [B] int64; temperature: [B] fp32, 0 = greedy; banned: [n] int64
    ids that are never sampled, or None. Logits are fp32 whatever the inputs' dtype, and the sums behind logprob and
    entropy are those of linear_logprob_entropy. Returns (token [B] int64, logprob [B] fp32, entropy [B] fp32).
    backend: "triton", "cpp" (hidden and weight fp32 or bf16 on the CPU: bit for bit what sample makes of
    linear(hidden, weight, wide=True)) or "reference", which has the logits in memory; default: the best.
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
    narrow = hidden.dtype == weight.dtype and hidden.dtype in TRITON_DTYPES
    chosen = choose(
        "linear_sample",
        backend,
        hidden,
        weight,
        cpp=hidden.dtype == weight.dtype and len(weight) > 0,
        triton=narrow,
        cpp_dtypes=FP32_BF16,
    )
    if chosen == "cpp":
        return torch.ops.axpo.linear_sample_cpu.default(hidden, weight, seeds, positions, temperature, banned)
    if chosen == "triton":
        from kernels.sampling.triton import linear_sample as fused

        return fused(hidden, weight, seeds, positions, temperature, banned)
    return linear_sample_reference(hidden, weight, seeds, positions, temperature, banned)


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


if LOADED:

    @torch.library.register_fake("axpo::linear_sample_cpu")
    def _(hidden, weight, seeds, positions, temperature, banned=None):
        return torch.empty_like(seeds), torch.empty_like(temperature), torch.empty_like(temperature)

"""The LM head fused with log-probability and entropy: differentiable, and no [N, V] tensor is kept."""

import torch

from kernels._library import MODE, choose
from kernels.linear_logprob_entropy.chunked import CPP_DTYPES, chunked
from kernels.linear_logprob_entropy.reference import IGNORE_INDEX, linear_logprob_entropy_reference
from kernels.linear_logprob_entropy.shards import linear_logprob_state, merge_shards

__all__ = [
    "IGNORE_INDEX",
    "linear_logprob_entropy",
    "linear_logprob_entropy_reference",
    "linear_logprob_state",
    "merge_shards",
]


def linear_logprob_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int = IGNORE_INDEX,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(label) and the exact entropy, in nats, of p = softmax(hidden @ weight.T / temperature).

    hidden: [N, H], weight: [V, H], labels: [N] int64, temperature: a number or [N], above 0.
    Returns (logprob [N], entropy [N]), fp32 (fp64 for fp64 hidden), differentiable in hidden and weight through both.
    Rows labelled ignore_index give 0 and 0 and no gradient. Logits are fp32 whatever the inputs' dtype; the backward
    recomputes them chunk by chunk, writes each slice of weight's gradient once and accumulates hidden's in fp32.
    backend: "triton", "cpp" (chunks of logits and C++ row kernels) or "reference" (log_softmax over [N, V]); see
    kernels._library.choose. A weight split over ranks: linear_logprob_state and merge_shards.
    Raises ValueError for shapes that disagree, a temperature not above 0, or (on the CPU) a label outside [0, V).
    """
    check_shapes("linear_logprob_entropy", hidden, weight, labels, temperature)
    chosen = choose(
        "linear_logprob_entropy",
        backend,
        hidden,
        weight,
        cpp=hidden.dtype in CPP_DTYPES,
        cpp_dtypes=CPP_DTYPES,
        triton=triton_serves(hidden, weight),
    )
    if chosen == "reference" and (backend or MODE) == "reference":
        return linear_logprob_entropy_reference(hidden, weight, labels, temperature, ignore_index)
    if chosen == "triton":
        from kernels.linear_logprob_entropy.triton import fused
    else:
        fused = chunked
    per_row = temperature_of_rows(temperature, hidden)
    logprob, entropy, _, _ = fused(hidden, weight, labels, per_row, ignore_index)
    return logprob, entropy

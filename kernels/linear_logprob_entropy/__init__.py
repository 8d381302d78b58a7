"""The LM head fused with log-probability and entropy: differentiable, and no [N, V] tensor is kept."""

import torch

from kernels.linear_logprob_entropy.dispatch import implementation
from kernels.linear_logprob_entropy.reference import linear_logprob_entropy_reference
from kernels.linear_logprob_entropy.shards import linear_logprob_state, merge_shards
from kernels.linear_logprob_entropy.state import IGNORE_INDEX, check, temperature_of_rows

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
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(label) and the exact entropy, in nats, of p = softmax(hidden @ weight.T / temperature).

    hidden: [N, H], weight: [V, H], labels: [N] int64, temperature: a number or [N], above 0.
    Returns (logprob [N], entropy [N]), fp32 (fp64 for fp64 hidden), differentiable in hidden and weight through both.
    Rows labelled ignore_index give 0 and 0 and no gradient. Logits are fp32 whatever the inputs' dtype; the backward
    recomputes them chunk by chunk, writes each slice of weight's gradient once and accumulates hidden's in fp32.
    backend: "triton", "cpp" (chunks of logits and C++ row kernels) or "reference" (log_softmax over [N, V]); see
    kernels._library.choose. For a weight that is split over ranks there are linear_logprob_state and merge_shards.
    Raises ValueError for shapes that disagree, a temperature not above 0, or (on the CPU) a label outside [0, V);
    elsewhere such a label's logprob is −inf.
    """
    check("linear_logprob_entropy", hidden, weight, labels, temperature)
    chosen = implementation("linear_logprob_entropy", backend, hidden, weight)
    if chosen == "reference":
        return linear_logprob_entropy_reference(hidden, weight, labels, temperature, ignore_index)
    if chosen == "triton":
        from kernels.linear_logprob_entropy.triton import fused as forward
    else:
        from kernels.linear_logprob_entropy.chunked import chunked as forward
    logprob, entropy, _, _ = forward(hidden, weight, labels, temperature_of_rows(temperature, hidden), ignore_index)
    return logprob, entropy

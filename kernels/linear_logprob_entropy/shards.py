"""linear_logprob_entropy over a vocabulary that is split over ranks (tensor parallelism), merged exactly.

Each rank computes the state of its own rows of the weight, the states are all-gathered (32 bytes a token and rank), and
each rank merges them with its own shard at hand, which is what its backward needs:

    state = linear_logprob_state(hidden, shard, labels, temperature, vocab_start)
    states = torch.distributed.nn.functional.all_gather(state)                       # [R, N, 4]
    logprob, entropy = merge_shards(states, hidden, shard, labels, temperature, vocab_start)

Every rank gets the same logprob and entropy. The backward gives shard its whole gradient, and hidden the part of its
gradient that comes through this shard: the sum over the ranks is hidden's gradient.
"""

import torch

from kernels.linear_logprob_entropy import chunked
from kernels.linear_logprob_entropy.dispatch import implementation
from kernels.linear_logprob_entropy.state import (
    IGNORE_INDEX,
    accumulator,
    check,
    merge_states,
    results,
    temperature_of_rows,
)


def linear_logprob_state(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    vocab_start: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """[N, 4] fp64 of a shard: max z, Σ e^{z−max}, Σ e^{z−max} (z−max), and the label's z, with z = logit / temperature.

    hidden: [N, H]; weight: [Vs, H], the rows vocab_start, vocab_start + 1, … of the whole weight; labels: [N] int64 of
    the whole vocabulary (the last entry is −inf where another shard holds the label). No gradient flows through it.
    Raises ValueError for shapes that disagree and for a temperature not above 0.
    """
    check("linear_logprob_state", hidden, weight, labels, temperature)
    if implementation("linear_logprob_state", backend, hidden, weight) == "triton":
        from kernels.linear_logprob_entropy.triton import state
    else:
        state = chunked.state
    with torch.no_grad():
        return state(hidden, weight, labels, temperature_of_rows(temperature, hidden), vocab_start)


def merge_shards(
    states: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    vocab_start: int = 0,
    ignore_index: int = IGNORE_INDEX,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprob [N], entropy [N]) of the whole vocabulary, differentiable in hidden and in this rank's weight.

    states: [R, N, 4], linear_logprob_state of all R shards; the other arguments are those of this rank's shard.
    Raises ValueError for shapes that disagree and for a temperature not above 0.
    """
    check("merge_shards", hidden, weight, labels, temperature)
    if states.ndim != 3 or states.shape[1:] != (len(hidden), 4):
        raise ValueError(f"merge_shards: states {list(states.shape)} must be [R, N, 4] with N = {len(hidden)}")
    triton = implementation("merge_shards", backend, hidden, weight) == "triton"
    per_row = temperature_of_rows(temperature, hidden)
    logprob, entropy, _, _ = merge(states, hidden, weight, labels, per_row, vocab_start, ignore_index, triton)
    return logprob, entropy


@torch.library.custom_op("axpo::merge_logprob_shards", mutates_args=())
def merge(
    states: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: torch.Tensor,
    vocab_start: int,
    ignore_index: int,
    triton: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob, entropy, max, log_sum), each [N]. hidden and weight take part in the backward only."""
    state = merge_states(states)
    logprob, entropy, maximum, log_sum = results(state, labels, ignore_index, accumulator(hidden))
    if triton:  # its backward measures from the largest logit before the temperature, which fp64 gives back exactly
        maximum = (state[:, 0] * temperature).to(maximum.dtype)
    return logprob, entropy, maximum, log_sum


@merge.register_fake
def _(states, hidden, weight, labels, temperature, vocab_start, ignore_index, triton):
    return tuple(hidden.new_empty(hidden.shape[:1], dtype=accumulator(hidden)) for _ in range(4))


def _setup_context(ctx, inputs, output) -> None:
    _, hidden, weight, labels, temperature, ctx.vocab_start, ctx.ignore_index, ctx.triton = inputs
    logprob, entropy, maximum, log_sum = output
    ctx.mark_non_differentiable(maximum, log_sum)
    ctx.save_for_backward(hidden, weight, labels, temperature, logprob, entropy, maximum, log_sum)


def _gradients(ctx, grad_logprob, grad_entropy, *_):
    if ctx.triton:
        from kernels.linear_logprob_entropy.triton import backward
    else:
        backward = chunked.backward
    needs = ctx.needs_input_grad[1:3]
    grads = backward(grad_logprob, grad_entropy, *ctx.saved_tensors, ctx.vocab_start, ctx.ignore_index, *needs)
    return None, *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(5 * [None])


merge.register_autograd(_gradients, setup_context=_setup_context)

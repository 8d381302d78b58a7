"""linear_logprob_entropy over chunks of fp32 logits, in C++ (csrc/cpu/linear_logprob.cpp) or in plain torch.

The CPU runs the C++; plain torch serves fp64 and devices without Triton.
"""

from collections.abc import Callable, Iterator

import torch

from kernels._library import LOADED, use_cpp
from kernels.linear_logprob_entropy.dispatch import CPP_DTYPES
from kernels.linear_logprob_entropy.state import accumulator, results

# Rows and vocabulary columns taken at a time in plain torch: 16 MiB of fp32 logits, which stay in a cache.
ROW_CHUNK = 1024
VOCAB_CHUNK = 4096


@torch.library.custom_op("axpo::linear_logprob_state", mutates_args=())
def state(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor, vocab_start: int
) -> torch.Tensor:
    """The state [N, 4] (see state.py) over weight's columns, which are tokens vocab_start, vocab_start + 1, …"""
    if use_cpp(hidden, weight, dtypes=CPP_DTYPES):
        return torch.ops.axpo.linear_logprob_state_cpu.default(hidden, weight, labels, temperature, vocab_start)
    state = hidden.new_zeros((len(hidden), 4), dtype=torch.float64)
    state[:, 0] = state[:, 3] = -torch.inf
    for first, columns in _vocabulary_chunks(weight, accumulator(hidden)):
        for start in range(0, len(hidden), ROW_CHUNK):
            rows = slice(start, start + ROW_CHUNK)
            z = hidden[rows].to(columns.dtype) @ columns.T
            _reduce(z, temperature[rows], labels[rows], vocab_start + first, state[rows])
    return state


@torch.library.custom_op("axpo::linear_logprob_entropy", mutates_args=())
def chunked(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob, entropy, max, log_sum), each [N]."""
    vocabulary = weight.shape[0]
    if labels.device.type == "cpu":
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))]
        if wrong.numel():
            raise ValueError(
                f"linear_logprob_entropy: label {int(wrong[0])} is outside the vocabulary of {vocabulary}: "
                f"use ignore_index = {ignore_index} for rows without a label"
            )
    return results(state(hidden, weight, labels, temperature, 0), labels, ignore_index, accumulator(hidden))


@torch.library.custom_op("axpo::linear_logprob_entropy_backward", mutates_args=())
def backward(
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: torch.Tensor,
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    maximum: torch.Tensor,
    log_sum: torch.Tensor,
    vocab_start: int,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden and weight; one that is not needed is returned empty.

    dz[j] = g_logprob (1[j = label] − p[j]) − g_entropy p[j] (log p[j] + entropy), and hidden's logits get dz / T.
    logprob … log_sum are of the whole vocabulary, of which weight may be the part from vocab_start on.
    """
    per_row = (temperature, logprob, entropy, maximum, log_sum, grad_logprob, grad_entropy)
    if use_cpp(hidden, weight, dtypes=CPP_DTYPES):
        tensors = (grad_logprob, grad_entropy, hidden, weight, labels, *per_row[:5])
        return torch.ops.axpo.linear_logprob_backward_cpu.default(
            *tensors, vocab_start, ignore_index, need_hidden, need_weight
        )
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=accumulator(hidden))
    grad_weight = weight.new_zeros(weight.shape if need_weight else (0,))
    for first, columns in _vocabulary_chunks(weight, accumulator(hidden)):
        total = torch.zeros_like(columns)
        for start in range(0, len(hidden), ROW_CHUNK):
            rows = slice(start, start + ROW_CHUNK)
            x = hidden[rows].to(columns.dtype)
            dz = x @ columns.T
            _differentiate(dz, labels[rows], vocab_start + first, ignore_index, *(r[rows] for r in per_row))
            if need_hidden:
                grad_hidden[rows].addmm_(dz, columns)
            if need_weight:
                total.addmm_(dz.T, x)
        if need_weight:
            grad_weight[first : first + len(total)] = total
    return grad_hidden.to(hidden.dtype), grad_weight


def _vocabulary_chunks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """(first token, rows of the weight) of each chunk."""
    for first in range(0, len(weight), VOCAB_CHUNK):
        yield first, weight[first : first + VOCAB_CHUNK].to(dtype)


def _reduce(
    logits: torch.Tensor, temperature: torch.Tensor, labels: torch.Tensor, first: int, state: torch.Tensor
) -> None:
    """Merges one chunk [N, C] of logits into the running state [N, 4] fp64."""
    z = logits.div_(temperature[:, None])
    here = (labels >= first) & (labels < first + z.shape[1])
    at_label = z.gather(1, torch.where(here, labels - first, 0)[:, None])[:, 0]
    chunk_max = z.amax(1, keepdim=True)
    shifted = z.sub_(chunk_max).clamp_(min=-700)  # e^-700 is nothing even in fp64, and -inf * 0 stays out
    exp = shifted.exp()
    chunk_sum, chunk_centred = exp.sum(1, dtype=torch.float64), exp.mul_(shifted).sum(1, dtype=torch.float64)
    maximum, total, centred = state[:, 0].clone(), state[:, 1].clone(), state[:, 2].clone()
    new = torch.maximum(maximum, chunk_max[:, 0].double())
    old_shift, shift = (maximum - new).clamp(min=-1e30), chunk_max[:, 0].double() - new
    a, b = old_shift.exp(), shift.exp()
    state[:, 0], state[:, 1] = new, a * total + b * chunk_sum
    state[:, 2] = a * (centred + total * old_shift) + b * (chunk_centred + chunk_sum * shift)
    state[:, 3] = torch.where(here, at_label.double(), state[:, 3])


def _differentiate(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    ignore_index: int,
    temperature: torch.Tensor,
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    maximum: torch.Tensor,
    log_sum: torch.Tensor,
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor,
) -> None:
    """Turns one chunk [N, C] of logits into their gradient, in place."""
    logp = logits.div_(temperature[:, None]).sub_(maximum[:, None]).sub_(log_sum[:, None]).clamp_(min=-700)
    here = (labels >= first) & (labels < first + logp.shape[1])
    column = torch.where(here, labels - first, 0)[:, None]
    # 1 − p by expm1: the plain difference has no correct digit left when p is close to 1.
    at_label = -grad_logprob * logprob.expm1() - grad_entropy * logprob.exp() * (logprob.clamp(min=-700) + entropy)
    p = logp.exp()
    dz = logp.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(grad_logprob[:, None]).mul_(p).neg_()
    dz.scatter_(1, column, torch.where(here[:, None], at_label[:, None], dz.gather(1, column)))
    dz.div_(temperature[:, None]).masked_fill_((labels == ignore_index)[:, None], 0.0)


@state.register_fake
def state_fake(hidden, weight, labels, temperature, vocab_start):
    return hidden.new_empty((hidden.shape[0], 4), dtype=torch.float64)


@chunked.register_fake
def forward_fake(hidden, weight, labels, temperature, ignore_index):
    return tuple(hidden.new_empty(hidden.shape[:1], dtype=accumulator(hidden)) for _ in range(4))


@backward.register_fake
def backward_fake(grad_logprob, grad_entropy, hidden, weight, *rest):
    need = rest[-2:]
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip((hidden, weight), need, strict=True))


def setup_context(ctx, inputs, output) -> None:
    hidden, weight, labels, temperature, ctx.ignore_index = inputs
    logprob, entropy, maximum, log_sum = output
    ctx.mark_non_differentiable(maximum, log_sum)
    ctx.save_for_backward(hidden, weight, labels, temperature, logprob, entropy, maximum, log_sum)


def gradients(backward: Callable) -> Callable:
    """The autograd rule that setup_context prepares, by the given backward."""

    def rule(ctx, grad_logprob, grad_entropy, *_):
        needs = ctx.needs_input_grad[:2]
        grads = backward(grad_logprob, grad_entropy, *ctx.saved_tensors, 0, ctx.ignore_index, *needs)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None

    return rule


chunked.register_autograd(gradients(backward), setup_context=setup_context)


if LOADED:
    torch.library.register_fake("axpo::linear_logprob_state_cpu", state_fake)
    torch.library.register_fake("axpo::linear_logprob_backward_cpu", backward_fake)

"""linear_logprob_entropy over chunks of fp32 logits: a matrix product, then the C++ row kernel or its torch form.

What the CPU runs, and any device without Triton.
"""

from collections.abc import Callable, Iterator

import torch

from kernels._library import use_cpp
from kernels.linear_logprob_entropy.state import accumulator, results

# Rows and vocabulary columns of each matrix product: 4 MiB of fp32 logits, which stay in a cache. BLAS libraries choose
# a routine, and so the order of a sum, by the shape. Every product has this one, the last rows being padded: so a row's
# bits do not depend on how many others there are.
ROW_CHUNK = 256
VOCAB_CHUNK = 4096


class Logits:
    """Logits of `rows` rows × a chunk of the vocabulary at a time, always in the same memory."""

    def __init__(self, hidden: torch.Tensor, vocabulary: int, rows: int):
        self.hidden, self.rows, self.dtype = hidden, rows, accumulator(hidden)
        self.memory = hidden.new_empty((rows * min(vocabulary, VOCAB_CHUNK),), dtype=self.dtype)
        self.padded = hidden.new_zeros((rows, hidden.shape[1]), dtype=self.dtype)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """[start, end) of the rows of each product."""
        n = len(self.hidden)
        return ((start, min(start + self.rows, n)) for start in range(0, n, self.rows))

    def compute(self, start: int, end: int, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden[start:end], its logits against `weight` [C, H]) in the accumulator's dtype, padded to self.rows."""
        x = self.hidden[start:end].to(self.dtype)
        if len(x) < self.rows:
            self.padded[: len(x)] = x
            x = self.padded
        return x, torch.mm(x, weight.T, out=self.memory[: self.rows * len(weight)].view(self.rows, len(weight)))


@torch.library.custom_op("axpo::linear_logprob_state", mutates_args=())
def state(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor, vocab_start: int
) -> torch.Tensor:
    """The state [N, 4] (see state.py) over weight's columns, which are tokens vocab_start, vocab_start + 1, …"""
    vocabulary, dtype, labels = weight.shape[0], accumulator(hidden), labels.contiguous()
    state = hidden.new_zeros((len(hidden), 4), dtype=torch.float64)
    state[:, 0] = state[:, 3] = -torch.inf
    logits = Logits(hidden, vocabulary, ROW_CHUNK)
    reduce: Callable = torch.ops.axpo.logprob_reduce.default if use_cpp(logits.memory) else reduce_reference
    for first in range(0, vocabulary, VOCAB_CHUNK):
        columns = weight[first : first + VOCAB_CHUNK].to(dtype)
        for start, end in logits.blocks():
            z = logits.compute(start, end, columns)[1][: end - start]
            reduce(z, temperature[start:end], labels[start:end], vocab_start + first, state[start:end])
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
    (n, h), vocabulary, dtype, labels = hidden.shape, weight.shape[0], accumulator(hidden), labels.contiguous()
    per_row = (temperature, logprob, entropy, maximum, log_sum, grad_logprob, grad_entropy)
    per_row = [x.contiguous() for x in per_row]
    logits = Logits(hidden, vocabulary, ROW_CHUNK)
    padded = (-(-n // ROW_CHUNK) * ROW_CHUNK, h)
    grad_hidden = hidden.new_zeros(padded if need_hidden else (0,), dtype=dtype)
    grad_weight = (weight.new_empty if n else weight.new_zeros)(weight.shape if need_weight else (0,))
    gradient: Callable = torch.ops.axpo.logprob_gradient.default if use_cpp(logits.memory) else gradient_reference
    for first in range(0, vocabulary, VOCAB_CHUNK):
        columns = weight[first : first + VOCAB_CHUNK].to(dtype)
        slice_ = grad_weight[first : first + VOCAB_CHUNK]
        total = slice_ if slice_.dtype == dtype else torch.empty_like(slice_, dtype=dtype)
        for start, end in logits.blocks():
            x, dz = logits.compute(start, end, columns)
            t, *stats = (r[start:end] for r in per_row)
            gradient(dz[: end - start], t, labels[start:end], vocab_start + first, ignore_index, *stats)
            dz[end - start :] = 0
            if need_hidden:
                grad_hidden[start : start + ROW_CHUNK].addmm_(dz, columns)
            if need_weight and start == 0:
                torch.mm(dz.T, x, out=total)
            elif need_weight:
                total.addmm_(dz.T, x)
        if n and total is not slice_:
            slice_.copy_(total)
    return grad_hidden[:n].to(hidden.dtype, copy=len(grad_hidden) > n), grad_weight


def reduce_reference(
    logits: torch.Tensor, temperature: torch.Tensor, labels: torch.Tensor, first: int, state: torch.Tensor
) -> None:
    """axpo::logprob_reduce in plain torch: merges one chunk [N, C] of logits into the running state [N, 4] fp64."""
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


def gradient_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    ignore_index: int,
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    maximum: torch.Tensor,
    log_sum: torch.Tensor,
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor,
) -> None:
    """axpo::logprob_gradient in plain torch: turns one chunk [N, C] of logits into their gradient, in place."""
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
def _(hidden, weight, labels, temperature, vocab_start):
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

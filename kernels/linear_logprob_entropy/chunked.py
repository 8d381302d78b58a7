"""The LM head fused with log-probability and entropy: differentiable, and no [N, V] tensor is kept."""

from collections.abc import Iterator

import torch

from kernels._library import MODE, use_cpp

IGNORE_INDEX = -100
# Rows and vocabulary columns taken at a time: at most 16 MiB of fp32 logits, which a last-level cache holds.
# The columns are fixed so that the order of a row's sums never depends on N.
ROW_CHUNK = 1024
VOCAB_CHUNK = 4096
# BLAS libraries multiply fewer rows than this by another routine, whose bits differ.
MIN_ROWS = 4


def linear_logprob_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(label) and the exact entropy, in nats, of p = softmax(hidden @ weight.T / temperature).

    hidden: [N, H], weight: [V, H], labels: [N] int64, temperature: a number or [N], above 0.
    Returns (logprob [N], entropy [N]), fp32 (fp64 for fp64 hidden), differentiable in hidden and weight through both.
    Rows labelled ignore_index give 0 and 0 and no gradient. Logits are fp32 whatever the inputs' dtype; the backward
    recomputes them chunk by chunk, writes each slice of weight's gradient once and accumulates hidden's in fp32.
    Raises ValueError for shapes that disagree, a temperature not above 0, or (on the CPU) a label outside [0, V).
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_logprob_entropy: hidden {list(hidden.shape)}, weight {list(weight.shape)} and labels "
            f"{list(labels.shape)} must be [N, H], [V, H] and [N]"
        )
    if not isinstance(temperature, torch.Tensor) and not temperature > 0:
        raise ValueError(f"linear_logprob_entropy: temperature is {temperature}: it must be above 0")
    if MODE == "reference":
        return linear_logprob_entropy_reference(hidden, weight, labels, temperature, ignore_index)
    per_row = torch.as_tensor(temperature, dtype=_accumulator(hidden), device=hidden.device).expand(hidden.shape[0])
    logprob, entropy, _, _ = _forward(hidden, weight, labels, per_row.contiguous(), ignore_index)
    return logprob, entropy


def linear_logprob_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[torch.Tensor, torch.Tensor]:
    """linear_logprob_entropy by log_softmax over all of [N, V]; any dtype (fp64 stays fp64), any device."""
    dtype = _accumulator(hidden)
    scale = temperature.to(dtype)[:, None] if isinstance(temperature, torch.Tensor) else temperature
    logp = torch.log_softmax(hidden.to(dtype) @ weight.to(dtype).T / scale, dim=-1)
    valid = labels != ignore_index
    logprob = logp.gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return torch.where(valid, logprob, 0.0), torch.where(valid, entropy, 0.0)


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _row_chunks(total: int) -> Iterator[tuple[int, int]]:
    """[start, end) of ROW_CHUNK rows each; a remainder below MIN_ROWS joins the chunk before it."""
    start = 0
    while start < total:
        end = total if total - start < ROW_CHUNK + MIN_ROWS else start + ROW_CHUNK
        yield start, end
        start = end


def _pad(x: torch.Tensor, rows: int, value: float = 0) -> torch.Tensor:
    return torch.cat((x, x.new_full((rows, *x.shape[1:]), value))) if rows > 0 else x


class _Logits:
    """fp32 logits of one (rows, vocabulary) chunk at a time, always in the same memory."""

    def __init__(self, hidden: torch.Tensor, vocabulary: int):
        self.hidden, self.dtype = hidden, _accumulator(hidden)
        rows = min(ROW_CHUNK + MIN_ROWS, hidden.shape[0])
        self.memory = hidden.new_empty((rows * min(vocabulary, VOCAB_CHUNK),), dtype=self.dtype)

    def compute(self, start: int, end: int, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden[start:end], its logits against `weight` [C, H]), both in the accumulator's dtype."""
        rows = self.hidden[start:end].to(self.dtype)
        out = self.memory[: (end - start) * weight.shape[0]].view(end - start, weight.shape[0])
        return rows, torch.mm(rows, weight.T, out=out)


@torch.library.custom_op("axpo::linear_logprob_entropy", mutates_args=())
def _forward(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob, entropy, max, log_sum), each [N]: logsumexp is max + log_sum, kept apart to lose no digits."""
    n, vocabulary, dtype = hidden.shape[0], weight.shape[0], _accumulator(hidden)
    if labels.device.type == "cpu":
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))]
        if wrong.numel():
            raise ValueError(
                f"linear_logprob_entropy: label {int(wrong[0])} is outside the vocabulary of {vocabulary}: "
                f"use ignore_index = {ignore_index} for rows without a label"
            )
    short = MIN_ROWS - n
    hidden, labels = _pad(hidden, short), _pad(labels.contiguous(), short, ignore_index)
    temperature = _pad(temperature, short, 1)
    state = hidden.new_zeros((len(hidden), 4), dtype=torch.float64)  # running max, sum, centred sum, label's logit
    state[:, 0] = -torch.inf
    logits = _Logits(hidden, vocabulary)
    reduce = torch.ops.axpo.logprob_reduce.default if use_cpp(logits.memory) else _reduce_reference
    for first in range(0, vocabulary, VOCAB_CHUNK):
        columns = weight[first : first + VOCAB_CHUNK].to(dtype)
        for start, end in _row_chunks(len(hidden)):
            _, z = logits.compute(start, end, columns)
            reduce(z, temperature[start:end], labels[start:end], first, state[start:end])
    maximum, total, centred, at_label = state[:n].unbind(1)
    log_sum = total.log()
    valid = labels[:n] != ignore_index
    logprob = torch.where(valid, at_label - maximum - log_sum, 0.0)
    entropy = torch.where(valid, log_sum - centred / total, 0.0)
    return logprob.to(dtype), entropy.to(dtype), maximum.to(dtype, copy=True), log_sum.to(dtype)


@torch.library.custom_op("axpo::linear_logprob_entropy_backward", mutates_args=())
def _backward(
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: torch.Tensor,
    entropy: torch.Tensor,
    maximum: torch.Tensor,
    log_sum: torch.Tensor,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden and weight; one that is not needed is returned empty.

    dz[j] = g_logprob (1[j = label] − p[j]) − g_entropy p[j] (log p[j] + entropy), and hidden's logits get dz / T.
    """
    n, vocabulary, dtype = hidden.shape[0], weight.shape[0], _accumulator(hidden)
    short = MIN_ROWS - n
    hidden, labels = _pad(hidden, short), _pad(labels.contiguous(), short, ignore_index)
    rows = [
        _pad(x.contiguous(), short, 1) for x in (temperature, maximum, log_sum, entropy, grad_logprob, grad_entropy)
    ]
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=dtype)
    grad_weight = weight.new_zeros(weight.shape if need_weight else (0,))
    logits = _Logits(hidden, vocabulary)
    gradient = torch.ops.axpo.logprob_gradient.default if use_cpp(logits.memory) else _gradient_reference
    for first in range(0, vocabulary, VOCAB_CHUNK):
        columns = weight[first : first + VOCAB_CHUNK].to(dtype)
        slice_ = grad_weight[first : first + VOCAB_CHUNK]
        total = slice_ if slice_.dtype == dtype else torch.zeros_like(slice_, dtype=dtype)
        for start, end in _row_chunks(len(hidden)):
            x, dz = logits.compute(start, end, columns)
            t, m, ls, h, gl, gh = (r[start:end] for r in rows)
            gradient(dz, t, labels[start:end], first, ignore_index, m, ls, h, gl, gh)
            if need_hidden:
                grad_hidden[start:end].addmm_(dz, columns)
            if need_weight:
                total.addmm_(dz.T, x)
        if total is not slice_:
            slice_.copy_(total)
    return grad_hidden[:n].to(hidden.dtype), grad_weight


def _reduce_reference(
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


def _gradient_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    ignore_index: int,
    maximum: torch.Tensor,
    log_sum: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor,
) -> None:
    """axpo::logprob_gradient in plain torch: turns one chunk [N, C] of logits into their gradient, in place."""
    logp = logits.div_(temperature[:, None]).sub_(maximum[:, None]).sub_(log_sum[:, None]).clamp_(min=-700)
    here = (labels >= first) & (labels < first + logp.shape[1])
    column = torch.where(here, labels - first, 0)[:, None]
    logp_label = logp.gather(1, column)
    # 1 − p by expm1: the plain difference has no correct digit left when p is close to 1.
    at_label = -grad_logprob[:, None] * logp_label.expm1()
    at_label -= grad_entropy[:, None] * logp_label.exp() * (logp_label + entropy[:, None])
    p = logp.exp()
    dz = logp.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(grad_logprob[:, None]).mul_(p).neg_()
    dz.scatter_(1, column, torch.where(here[:, None], at_label, dz.gather(1, column)))
    dz.div_(temperature[:, None]).masked_fill_((labels == ignore_index)[:, None], 0.0)


@_forward.register_fake
def _(hidden, weight, labels, temperature, ignore_index):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(hidden.new_empty(hidden.shape[:1], dtype=dtype) for _ in range(4))


@_backward.register_fake
def _(grad_logprob, grad_entropy, hidden, weight, labels, temperature, entropy, maximum, log_sum, ignore_index, *need):
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip((hidden, weight), need, strict=True))


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, labels, temperature, ctx.ignore_index = inputs
    _, entropy, maximum, log_sum = output
    ctx.mark_non_differentiable(maximum, log_sum)
    ctx.save_for_backward(hidden, weight, labels, temperature, entropy, maximum, log_sum)


def _backward_autograd(ctx, grad_logprob, grad_entropy, *_):
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    grads = _backward(grad_logprob, grad_entropy, *ctx.saved_tensors, ctx.ignore_index, need_hidden, need_weight)
    return grads[0] if need_hidden else None, grads[1] if need_weight else None, None, None, None


_forward.register_autograd(_backward_autograd, setup_context=_setup_context)

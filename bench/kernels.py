"""Every kernel beside its plain-torch reference on the CPU: `pytest bench/kernels.py [-k NAME]`."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model, and how much of it a call sees."""

    name: str
    tokens: int  # packed tokens of a training row
    predicted: int  # of which the LM head sees
    sequences: int  # decoded together
    context: int  # tokens each of them has in the cache
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int


SHAPES = (
    Shape("mini", 1024, 1024, 256, 256, 128, 4, 2, 32, 384, 551),
    Shape("0.6b", 512, 32, 16, 1024, 1024, 16, 8, 128, 3072, 151_936),
)
EPS, BLOCK = 1e-6, 16


def heads(s: Shape, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v as views of one fused projection."""
    fused = torch.randn(tokens, (s.heads + 2 * s.kv_heads) * s.head_dim).unflatten(1, (-1, s.head_dim))
    q, k, v = fused.split((s.heads, s.kv_heads, s.kv_heads), dim=1)
    return q, k, v


def angles(s: Shape, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(tokens, s.head_dim // 2) * 100
    return angle.cos(), angle.sin()


def tree(s: Shape) -> torch.Tensor:
    """subtree_end of a prompt of half the tokens with eight equal rollouts."""
    end = torch.full((s.tokens,), s.tokens)
    for start in range(s.tokens // 2, s.tokens, s.tokens // 16):
        end[start : start + s.tokens // 16] = start + s.tokens // 16
    return end


def caches(s: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (s.sequences * s.context // BLOCK, s.kv_heads, BLOCK, s.head_dim)
    return torch.randn(shape), torch.randn(shape)


def decode(s: Shape) -> tuple:
    """One new token of each sequence over its paged context."""
    blocks = torch.randperm(s.sequences * s.context // BLOCK).view(s.sequences, -1).int()
    starts, lengths = torch.arange(s.sequences + 1).int(), torch.full((s.sequences,), s.context).int()
    return heads(s, s.sequences)[0].contiguous(), *caches(s), blocks, starts, lengths, s.head_dim**-0.5


def slots(s: Shape) -> tuple:
    q_k_v = heads(s, s.sequences)
    return *q_k_v[1:], *caches(s), torch.randperm(s.sequences * s.context)[: s.sequences]


def copies(s: Shape) -> tuple:
    """The partial tail blocks of 8 forks, in 4 layers."""
    kv = torch.randn(4, 2, 64, s.kv_heads, BLOCK, s.head_dim)
    return kv, torch.arange(8), torch.arange(8) + 8, torch.full((8,), BLOCK // 2)


def sampling(s: Shape, top_k: int = 0, top_p: float = 1.0) -> tuple:
    b, rows = s.sequences, torch.arange(s.sequences)
    logits = torch.randn(b, s.vocabulary) * 3
    return logits, rows, rows, torch.ones(b), torch.full((b,), top_k), torch.full((b,), top_p)


def head(s: Shape) -> tuple:
    hidden, weight = torch.randn(s.predicted, s.hidden), torch.randn(s.vocabulary, s.hidden) / s.hidden**0.5
    return hidden, weight, torch.randint(s.vocabulary, (s.predicted,))


# name: (module, function, arguments of a shape, whether it is trained through)
CASES: dict[str, tuple[str, str, Callable[[Shape], tuple], bool]] = {
    "rmsnorm": ("rmsnorm", "rmsnorm", lambda s: (torch.randn(s.tokens, s.hidden), torch.ones(s.hidden), EPS), True),
    "add_rmsnorm": (
        "rmsnorm",
        "add_rmsnorm",
        lambda s: (*torch.randn(2, s.tokens, s.hidden), torch.ones(s.hidden), EPS),
        True,
    ),
    "head_rmsnorm": ("rmsnorm", "rmsnorm", lambda s: (heads(s, s.tokens)[0], torch.ones(s.head_dim), EPS), True),
    "rotary": ("rotary", "rotary", lambda s: (*heads(s, s.tokens)[:2], *angles(s, s.tokens)), True),
    "swiglu": ("swiglu", "swiglu", lambda s: tuple(torch.randn(2, s.tokens, s.intermediate)), True),
    "linear_logprob_entropy": ("linear_logprob_entropy", "linear_logprob_entropy", head, True),
    "tree_attention": (
        "tree_attention",
        "tree_attention",
        lambda s: (*heads(s, s.tokens), tree(s), s.head_dim**-0.5),
        True,
    ),
    "paged_attention": ("paged_attention", "paged_attention", decode, False),
    "write_kv": ("kv_cache", "write_kv", slots, False),
    "copy_blocks": ("kv_cache", "copy_blocks", copies, False),
    "sample": ("sampling", "sample", sampling, False),
    "sample_top_k": ("sampling", "sample", lambda s: sampling(s, top_k=20), False),
    "sample_top_p": ("sampling", "sample", lambda s: sampling(s, top_p=0.9), False),
}


def forward(f: Callable, arguments: tuple) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return f(*arguments)

    return call


def forward_backward(f: Callable, arguments: tuple) -> Callable[[], object]:
    """Both passes, with gradients of the leading floating-point tensors (for rotary of q and k, not of the angles)."""
    inputs = []
    for a in arguments[: 2 if f.__name__.startswith("rotary") else None]:
        if not (isinstance(a, torch.Tensor) and a.is_floating_point()):
            break
        inputs.append(a.detach().requires_grad_())

    def call() -> object:
        outputs = f(*inputs, *arguments[len(inputs) :])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])

    return call


@pytest.mark.benchmark(min_rounds=3, min_time=1e-5, max_time=0.3)
@pytest.mark.parametrize("implementation", ["ours", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("name", "mode"), [(n, m) for n, c in CASES.items() for m in ("forward", "backward")[: 1 + c[3]]]
)
def test_kernel(benchmark, name: str, mode: str, shape: Shape, implementation: str) -> None:
    module, function, arguments, _ = CASES[name]
    suffix = "_reference" if implementation == "reference" else ""
    f = getattr(importlib.import_module(f"kernels.{module}"), function + suffix)
    torch.manual_seed(0)
    call = (forward if mode == "forward" else forward_backward)(f, arguments(shape))
    benchmark.group = f"{name}, {shape.name}, {'forward' if mode == 'forward' else 'forward and backward'}"
    call()
    benchmark(call)

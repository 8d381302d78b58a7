"""What the kernel benchmarks measure: one entry an operation, with its inputs, its work and its peers.

Used by bench/kernels.py (pytest-benchmark), bench/gpu_suite.py and bench/tune.py. An operation is added by one entry in
CASES. A case's arguments are drawn under torch's default device and dtype, which `draw` sets; what always has another
dtype says so.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bench import peers


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model, and how much of it a call sees."""

    name: str
    tokens: int  # packed tokens of a training row
    predicted: int  # of which the LM head sees
    attended: int  # packed tokens of a call of tree attention
    sequences: int  # decoded together
    prefix: int  # tokens that these share in the cache
    tail: int  # and that each of them has for itself
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    layers: int  # of the cache that a copied block has


@dataclass(frozen=True, slots=True)
class Work:
    """What a call cannot do without: bytes read and written once, floating-point operations of the matrix products."""

    bytes: int
    flops: int = 0

    def floor(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Seconds on a machine of these speeds."""
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation.

    function: of `module`; its plain form is there as <function>_reference. arguments: of both, and of the peers.
    plan: keyword arguments of ours, made once for these arguments. prepare: arguments that a peer has instead, by its
    name. forward, backward: the work of arguments; backward None: not trained through. inputs: how many leading
    arguments have a gradient. mutates: indices of the arguments that are written. compiled: whether torch.compile of
    the reference is a peer. graph: so short that on CUDA a graph of it is replayed.
    """

    name: str
    module: str
    function: str
    arguments: Callable[[Shape], tuple]
    forward: Callable[..., Work]
    backward: Callable[..., Work] | None = None
    inputs: int = 0
    mutates: tuple[int, ...] = ()
    peers: Mapping[str, Callable] = field(default_factory=dict)
    plan: Callable[..., dict[str, Any]] | None = None
    prepare: Mapping[str, Callable[..., tuple]] = field(default_factory=dict)
    compiled: bool = True
    graph: bool = False

    def ours(self, arguments: tuple, backend: str | None = None) -> Callable:
        """Our function, ready to be called with the arguments."""
        function = getattr(importlib.import_module(self.module), self.function)
        chosen = {"backend": backend} if backend else {}
        return partial(function, **chosen, **(self.plan(*arguments) if self.plan else {}))

    @property
    def reference(self) -> Callable:
        return getattr(importlib.import_module(self.module), f"{self.function}_reference")

    def peer(self, name: str) -> Callable:
        """Another implementation: "torch" (its own operation, or the reference), "compile", or one of `peers`."""
        if name == "compile":
            torch.compiler.reset()  # else the same reference at many shapes meets the limit of recompilations
            return torch.compile(self.reference, dynamic=False)
        return self.peers.get(name, self.reference)

    @property
    def peer_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("torch", *("compile",) * self.compiled, *self.peers)))


EPS, BLOCK = 1e-6, 16


def draw(case: Case, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple:
    """The case's arguments."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(seed)
            return case.arguments(shape)
    finally:
        torch.set_default_dtype(before)


def size(*tensors: torch.Tensor) -> int:
    """Bytes of what the tensors show (of a view, not of what it is a view of)."""
    return sum(t.numel() * t.element_size() for t in tensors)


def heads(s: Shape, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v as views of one fused projection."""
    fused = torch.randn(tokens, s.heads + 2 * s.kv_heads, s.head_dim)
    q, k, v = fused.split((s.heads, s.kv_heads, s.kv_heads), dim=1)
    return q, k, v


def angles(s: Shape, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(tokens, s.head_dim // 2, dtype=torch.float32) * 100
    return angle.cos(), angle.sin()


def causal(s: Shape) -> tuple:
    return *heads(s, s.attended), torch.full((s.attended,), s.attended), s.head_dim**-0.5


def tree(s: Shape) -> tuple:
    """A prompt of half the tokens with eight equal rollouts."""
    end = torch.full((s.attended,), s.attended)
    run = s.attended // 16
    end[8 * run :] = (torch.arange(8 * run, 16 * run) // run + 1) * run
    return *heads(s, s.attended), end, s.head_dim**-0.5


def attention_work(products: int) -> Callable[..., Work]:
    """Of `products` matrix products over the visible pairs: 2 forward, 5 backward."""

    def work(q, k, v, end, scale) -> Work:
        pairs = int((end - torch.arange(len(end), device=end.device)).sum())
        return Work(size(q, k, v, q) * (products - 1) // 2, 2 * products * pairs * q.shape[1] * q.shape[2])

    return work


def decode(s: Shape) -> tuple:
    """One new token of each sequence over a shared prefix and its own tail."""
    shared, own = s.prefix // BLOCK, -(-s.tail // BLOCK)
    order = torch.randperm(shared + s.sequences * own).int()
    tables = torch.cat([order[:shared].expand(s.sequences, -1), order[shared:].view(s.sequences, own)], 1).contiguous()
    starts = torch.arange(s.sequences + 1).int()
    lengths = torch.full((s.sequences,), s.prefix + s.tail).int()
    k_cache, v_cache = torch.randn(2, len(order), s.kv_heads, BLOCK, s.head_dim)
    q = heads(s, s.sequences)[0].contiguous()
    return q, k_cache, v_cache, tables, starts, lengths, s.head_dim**-0.5


def decode_plan(q, k_cache, v_cache, tables, starts, lengths, scale) -> dict[str, Any]:
    module = importlib.import_module("kernels.paged_attention")
    return {"plan": module.paged_plan(tables.cpu(), starts.cpu(), lengths.cpu(), q.shape[1], k_cache)}


def decode_work(q, k_cache, v_cache, tables, starts, lengths, scale) -> Work:
    token_bytes = 2 * k_cache.shape[1] * k_cache.shape[3] * k_cache.element_size()
    pairs = int(lengths.sum()) * q.shape[1] * q.shape[2]
    return Work(size(q, q) + len(tables.unique()) * BLOCK * token_bytes, 4 * pairs)


def slots(s: Shape) -> tuple:
    blocks = s.sequences * (s.prefix + s.tail) // BLOCK
    caches = torch.randn(2, blocks, s.kv_heads, BLOCK, s.head_dim)
    return *heads(s, s.sequences)[1:], *caches, torch.randperm(blocks * BLOCK)[: s.sequences]


def copies(s: Shape) -> tuple:
    """The half-full tail blocks of 15 forks, in all layers."""
    kv = torch.randn(s.layers, 2, 64, s.kv_heads, BLOCK, s.head_dim)
    return kv, torch.zeros(15, dtype=torch.int64), torch.arange(15) + 1, torch.full((15,), BLOCK // 2)


def sampling(s: Shape, top_k: int = 0, top_p: float = 1.0) -> tuple:
    b, rows = s.sequences, torch.arange(s.sequences)
    logits = torch.randn(b, s.vocabulary, dtype=torch.float32) * 3
    temperature, top_ps = torch.ones(b, dtype=torch.float32), torch.full((b,), top_p, dtype=torch.float32)
    return logits, rows, rows, temperature, torch.full((b,), top_k), top_ps


def head(s: Shape) -> tuple:
    hidden, weight = torch.randn(s.predicted, s.hidden), torch.randn(s.vocabulary, s.hidden)
    return hidden, weight.mul_(s.hidden**-0.5), torch.randint(s.vocabulary, (s.predicted,))


def head_work(products: int) -> Callable[..., Work]:
    """Of `products` matrix products of N · V · H: 1 forward, 3 backward (the logits again, then both gradients)."""

    def work(hidden, weight, labels) -> Work:
        return Work(size(hidden, weight) * products, 2 * products * len(hidden) * weight.numel())

    return work


def sample_work(logits, *_) -> Work:
    return Work(size(logits))


def head_sampling(s: Shape) -> tuple:
    hidden, weight = torch.randn(s.sequences, s.hidden), torch.randn(s.vocabulary, s.hidden)
    rows = torch.arange(s.sequences)
    return hidden, weight.mul_(3 * s.hidden**-0.5), rows, rows, torch.ones(s.sequences, dtype=torch.float32)


CASES = (
    Case(
        name="rmsnorm",
        module="kernels.rmsnorm",
        function="rmsnorm",
        arguments=lambda s: (torch.randn(s.tokens, s.hidden), torch.ones(s.hidden), EPS),
        forward=lambda x, w, eps: Work(size(x, x, w)),
        backward=lambda x, w, eps: Work(size(x, x, x, w, w)),
        inputs=2,
        peers={"torch": peers.rms_norm, "liger": peers.liger_rms_norm},
    ),
    Case(
        name="head_rmsnorm",
        module="kernels.rmsnorm",
        function="rmsnorm",
        arguments=lambda s: (heads(s, s.tokens)[0], torch.ones(s.head_dim), EPS),
        forward=lambda x, w, eps: Work(size(x, x, w)),
        backward=lambda x, w, eps: Work(size(x, x, x, w, w)),
        inputs=2,
        peers={"torch": peers.rms_norm, "liger": peers.liger_rms_norm},
    ),
    Case(
        name="add_rmsnorm",
        module="kernels.rmsnorm",
        function="add_rmsnorm",
        arguments=lambda s: (*torch.randn(2, s.tokens, s.hidden), torch.ones(s.hidden), EPS),
        forward=lambda x, r, w, eps: Work(size(x, x, x, x, w)),
        backward=lambda x, r, w, eps: Work(size(x, x, x, x, w, w)),
        inputs=3,
        peers={"torch": peers.add_rms_norm, "liger": peers.liger_add_rms_norm},
    ),
    Case(
        name="rotary",
        module="kernels.rotary",
        function="rotary",
        arguments=lambda s: (*heads(s, s.tokens)[:2], *angles(s, s.tokens)),
        forward=lambda q, k, cos, sin: Work(size(q, q, k, k, cos, sin)),
        backward=lambda q, k, cos, sin: Work(size(q, q, k, k, cos, sin)),
        inputs=2,
        peers={"liger": peers.liger_rotary},
    ),
    Case(
        name="swiglu",
        module="kernels.swiglu",
        function="swiglu",
        arguments=lambda s: tuple(torch.randn(2, s.tokens, s.intermediate)),
        forward=lambda gate, up: Work(size(gate, gate, gate)),
        backward=lambda gate, up: Work(size(gate, gate, gate, gate, gate)),
        inputs=2,
        peers={"liger": peers.liger_swiglu},
    ),
    Case(
        name="linear_logprob_entropy",
        module="kernels.linear_logprob_entropy",
        function="linear_logprob_entropy",
        arguments=head,
        forward=head_work(1),
        backward=head_work(3),
        inputs=2,
        peers={"liger": peers.liger_logprob_entropy, "cce": peers.cce_logprob},
    ),
    Case(
        name="causal_attention",
        module="kernels.tree_attention",
        function="tree_attention",
        arguments=causal,
        forward=attention_work(2),
        backward=attention_work(5),
        inputs=3,
        peers={"torch": peers.causal_sdpa},
        compiled=False,
    ),
    Case(
        name="tree_attention",
        module="kernels.tree_attention",
        function="tree_attention",
        arguments=tree,
        forward=attention_work(2),
        backward=attention_work(5),
        inputs=3,
        peers={"torch": peers.unshared_sdpa, "flex": peers.flex_attention},
        prepare={"torch": peers.unshare},
        compiled=False,
    ),
    Case(
        name="paged_attention",
        module="kernels.paged_attention",
        function="paged_attention",
        arguments=decode,
        forward=decode_work,
        plan=decode_plan,
        peers={"torch": peers.gathered_sdpa},
        compiled=False,
        graph=True,
    ),
    Case(
        name="write_kv",
        module="kernels.kv_cache",
        function="write_kv",
        arguments=slots,
        forward=lambda k, v, k_cache, v_cache, slots: Work(2 * size(k, v)),
        mutates=(2, 3),
        graph=True,
    ),
    Case(
        name="copy_blocks",
        module="kernels.kv_cache",
        function="copy_blocks",
        arguments=copies,
        forward=lambda kv, src, dst, valid: Work(size(kv[:, :, src]) // 15 * 16 // 2),  # the source is read once
        mutates=(0,),
        graph=True,
    ),
    Case(
        name="sample",
        module="kernels.sampling",
        function="sample",
        arguments=sampling,
        forward=sample_work,
        peers={"torch": peers.multinomial},
        compiled=False,
    ),
    Case(
        name="sample_top_k",
        module="kernels.sampling",
        function="sample",
        arguments=lambda s: sampling(s, top_k=20),
        forward=sample_work,
        compiled=False,
    ),
    Case(
        name="sample_top_p",
        module="kernels.sampling",
        function="sample",
        arguments=lambda s: sampling(s, top_p=0.9),
        forward=sample_work,
        compiled=False,
    ),
    Case(
        name="linear_sample",
        module="kernels.sampling",
        function="linear_sample",
        arguments=head_sampling,
        forward=lambda hidden, weight, *_: head_work(1)(hidden, weight, None),
        compiled=False,
    ),
)

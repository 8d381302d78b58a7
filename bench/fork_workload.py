"""The fork benchmark's workload, what is measured of a system, and the least that the machine could do it in."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.fork_models import Prefix
from bench.measure import floors, seconds
from engine.models import ModelConfig

BLOCK = 16  # tokens of one of our KV blocks


@dataclass(frozen=True, slots=True)
class Workload:
    """`forks` branches at the prefix's end, `new_tokens` each; then as many inside the first branch's continuation.

    A branch inside gets a token of its own first, as an observation would, so that greedy branches differ, and
    `inside_tokens` new ones. temperature 0 is greedy. Nothing ends a branch early.
    """

    prefix: Prefix
    forks: int
    new_tokens: int
    temperature: float = 0.0

    @property
    def inside_at(self) -> int:
        """Tokens kept by the forks inside: half of the continuation, and never a whole block, so that a tail moves."""
        at = len(self.prefix) + self.new_tokens // 2
        return at - (at % BLOCK == 0)

    @property
    def inside_tokens(self) -> int:
        return self.new_tokens // 2

    @property
    def own_tokens(self) -> list[int]:
        """One token for each of the branches inside; of the low ids, which are no special ones."""
        return [1 + index % 255 for index in range(self.forks)]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence there will be."""
        return len(self.prefix) + max(self.new_tokens, self.new_tokens // 2 + 1 + self.inside_tokens)

    def inside_prompts(self, continuation: list[int]) -> list[list[int]]:
        """The branches inside as prompts of their own, given what the first branch said."""
        kept = self.prefix.token_ids + continuation[: self.inside_at - len(self.prefix)]
        return [[*kept, token] for token in self.own_tokens]


@dataclass(frozen=True, slots=True)
class Conditions:
    """What all systems have in common. limit_s: of one group of branches; what takes longer is cut off and marked.

    continuation: what the first system's first branch said, so that all have the same prompts inside. tick(done, of):
    called with the new tokens so far.
    """

    path: Path
    dtype: torch.dtype
    device: torch.device
    limit_s: float = 600.0
    continuation: list[int] | None = None
    tick: Callable[[int, int], None] = lambda done, of: None


@dataclass(slots=True)
class Branches:
    """One group of branches: seconds, tokens after the moment when all had their first, and what was said.

    bytes_copied and recomputed (tokens computed again) are of one fork; None where the system does not say.
    """

    first_token_s: float
    decode_s: float
    decode_tokens: int
    outputs: list[list[int]]
    bytes_copied: float | None = None
    recomputed: float | None = None
    kv_bytes: int | None = None
    fork_s: float | None = None
    complete: bool = True

    @property
    def tokens_per_s(self) -> float | None:
        """Of the whole workload: all new tokens of all branches over the time from the fork to the last of them."""
        tokens, took = sum(map(len, self.outputs)), self.first_token_s + self.decode_s
        return tokens / took if tokens and took > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Of decoding alone: what came after the moment when every branch had a token."""
        return self.decode_tokens / self.decode_s if self.decode_tokens and self.decode_s > 0 else None


@dataclass(slots=True)
class Measured:
    """One system: its two groups of branches, or why there are none."""

    system: str
    prefill_s: float | None = None
    end: Branches | None = None
    inside: Branches | None = None
    cpu_s: float | None = None
    notes: list[str] = field(default_factory=list)
    error: str = ""


@dataclass(slots=True)
class Clock:
    """Times a group of branches as its tokens arrive."""

    conditions: Conditions
    branches: int
    wanted: int
    start: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    tokens_at_first: int = 0
    tokens: int = 0

    def tokens_are(self, counts: list[int]) -> None:
        """To be called after each step with the new tokens of every branch."""
        now, self.tokens = time.perf_counter(), sum(counts)
        if self.first is None and len(counts) == self.branches and min(counts) > 0:
            self.first, self.tokens_at_first = now, self.tokens
        self.last = now
        self.conditions.tick(self.tokens, self.branches * self.wanted)

    @property
    def over(self) -> bool:
        return time.perf_counter() - self.start > self.conditions.limit_s

    def read(self, outputs: list[list[int]], **more: Any) -> Branches:
        """Raises TimeoutError when not every branch has a token."""
        if self.first is None:
            raise TimeoutError(f"no first token of all {self.branches} branches within {self.conditions.limit_s:g} s")
        complete = all(len(output) == self.wanted for output in outputs)
        decoded = self.tokens - self.tokens_at_first
        return Branches(self.first - self.start, self.last - self.first, decoded, outputs, complete=complete, **more)


@dataclass(frozen=True, slots=True)
class Floors:
    """The least seconds on this machine: a large copy (bytes read and written a second), a matrix product (FLOP/s).

    A step cannot do without reading the weights and the KV in sight once, nor without its matrix products.
    """

    copy_bytes_per_s: float
    matmul_flops_per_s: float
    layer_parameters: int
    head_parameters: int
    token_bytes: int
    attention_flops: int
    itemsize: int

    @classmethod
    def measure(cls, path: Path, dtype: torch.dtype, device: torch.device) -> "Floors":
        copy, product = floors(device)
        if device.type != "cuda" and dtype != torch.float32:
            # `floors` multiplies fp32 there, which is the faster one on processors without matrix units.
            a, b = (torch.randn(1024, 1024, device=device).to(dtype) for _ in range(2))
            product = max(product, 2 * 1024**3 / seconds(lambda: a @ b, device))
        t = ModelConfig.from_pretrained(path).text
        heads = (2 * t.num_heads + 2 * t.num_kv_heads) * t.head_dim * t.hidden_size
        layers = t.num_layers * (heads + 3 * t.hidden_size * t.intermediate_size)
        token = 2 * t.num_layers * t.num_kv_heads * t.head_dim * dtype.itemsize
        pair = 4 * t.num_layers * t.num_heads * t.head_dim
        return cls(copy, product, layers, t.hidden_size * t.vocab_size, token, pair, dtype.itemsize)

    def prefill(self, tokens: int) -> float:
        """Of `tokens` tokens of one sequence; the head sees the last one."""
        flops = 2 * self.layer_parameters * tokens + self.attention_flops * tokens * tokens // 2
        return self._least(self.layer_parameters * self.itemsize + tokens * self.token_bytes, flops)

    def head(self, rows: int) -> float:
        """Of sampling `rows` tokens whose hidden states are known: a fork at a prefilled end has no more to do."""
        return self._least(self.head_parameters * self.itemsize, 2 * rows * self.head_parameters)

    def step(self, rows: int, shared: int, own: float) -> float:
        """Of one token of each of `rows` branches over `shared` common tokens and `own` tokens of each."""
        parameters = self.layer_parameters + self.head_parameters
        moved = parameters * self.itemsize + int((shared + rows * own) * self.token_bytes)
        return self._least(moved, 2 * rows * parameters + int(self.attention_flops * rows * (shared + own)))

    def held(self, shared: int, own: list[int]) -> int:
        """Bytes of KV: the common tokens once, and each branch's own but the last, which was sampled and has none."""
        return (shared + sum(max(count - 1, 0) for count in own)) * self.token_bytes

    def copy(self, moved: float) -> float:
        """Of moving `moved` bytes: they are read and written."""
        return 2 * moved / self.copy_bytes_per_s

    def _least(self, moved: int, flops: int) -> float:
        return max(moved / self.copy_bytes_per_s, flops / self.matmul_flops_per_s)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

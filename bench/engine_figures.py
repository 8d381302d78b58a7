"""What is claimed of the whole engine on a GPU, each figure with its target: forks, decoding over shared KV, copies.

One engine of Qwen3-VL-8B's language model with random weights, drawn on the device, does all of it: attention is shared
or not by a flag of its plans, and a re-prefill is the same prompts opened anew, as nothing is cached.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.fork_models import SHAPES, TextShape, fill_random, random_prefix, write_config
from bench.fork_ours import forked, fresh, kv_bytes_of, open_prompt
from bench.fork_workload import BLOCK, Branches, Conditions, Floors, Workload, synchronize
from bench.measure import seconds
from engine import LLM
from engine.sequence import Sequence
from kernels import copy_blocks

COPIES = 32  # in one CUDA graph, each of another block: the launch of the graph is no part of a copy in a stream
SAMPLES = 5  # of the time to the first token, whose median counts


@dataclass(frozen=True, slots=True)
class Size:
    """A text model, and how it is forked."""

    model: TextShape
    head_dim: int
    prefix: int
    forks: int
    new_tokens: int


LARGE = Size(SHAPES["8b"], 128, 8192, 16, 64)
REHEARSAL = Size(TextShape(32, 48, 2, 4, 2, 96, False), 16, 40, 3, 6)


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value, which is to be at least `least` and at most `most`."""

    name: str
    value: float
    unit: str
    detail: str
    least: float = 0.0
    most: float = float("inf")

    @property
    def met(self) -> bool:
        return self.least <= self.value <= self.most

    @property
    def target(self) -> str:
        return f"≥ {self.least:g} {self.unit}" if self.least else f"≤ {self.most:g} {self.unit}"


def measure(size: Size, device: torch.device, limit_s: float = 120.0) -> Iterator[Figure]:
    """Copy-on-write of a block, then the engine's figures. limit_s: of one group of branches."""
    yield _copy_on_write(size, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        write_config(path, size.model, size.head_dim)
        work = Workload(random_prefix(path, size.prefix), size.forks, size.new_tokens)
        conditions = Conditions(path, dtype, device, limit_s)
        llm = LLM(
            path,
            dtype=dtype,
            device=device,
            load_format="dummy",
            kv_cache_bytes=kv_bytes_of(work, conditions, reprefill=True),
            block_size=BLOCK,
            max_num_seqs=size.forks,
            enable_prefix_caching=False,
        )
        fill_random(llm.model.named_parameters(), size.model, size.head_dim)
        llm.weights_updated()
        yield from _of_forks(llm, work, conditions, Floors.measure(path, dtype, device))


def _copy_on_write(size: Size, device: torch.device) -> Figure:
    shape = (size.model.layers, 2, 2 * COPIES, size.model.kv_heads, BLOCK, size.head_dim)
    kv = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    pairs = torch.arange(2 * COPIES, device=device).view(COPIES, 2, 1)
    valid = torch.full((1,), BLOCK, device=device)
    indices = [(pair[0], pair[1], valid) for pair in pairs]

    def call() -> None:
        for index in indices:
            copy_blocks(kv, *index)

    took = seconds(call, device, graph=True) / COPIES * 1e6
    moved = 2 * kv[:, :, 0].nbytes
    detail = f"{moved / 1e6:.2f} MB read and written over {size.model.layers} layers"
    return Figure("copy-on-write of one block", took, "µs", detail, most=6.0)


def _of_forks(llm: LLM, work: Workload, conditions: Conditions, floors: Floors) -> Iterator[Figure]:
    root = open_prompt(llm, work.prefix.token_ids, work.prefix)
    llm.prefill([root])

    def branches(count: int) -> Branches:
        return _closing(lambda opened: forked(llm, work, conditions, root, None, count, opened))

    branches(4)  # compiles, and captures the graph
    first = statistics.median(branches(1).first_token_s for _ in range(SAMPLES))
    rates = {}
    for share in (True, False):
        llm.attention.share_prefixes = share  # of the plans to come; the graphs are the same
        branches(4)
        rates[share] = branches(work.new_tokens).decode_tokens_per_s or 0.0
    llm.attention.share_prefixes = True
    root.close()
    prompts = [work.prefix.token_ids] * work.forks
    synchronize(llm.device)
    again = _closing(lambda opened: fresh(llm, work, conditions, prompts, 1, opened)).first_token_s

    what = f"prefix {len(work.prefix)}, {work.forks} forks"
    detail = f"{first * 1e3:.2f} ms against {again * 1e3:.0f} ms, {what}"
    yield Figure("fork to first token beside re-prefill", again / first, "times", detail, least=500)
    detail = f"{rates[True]:.0f} against {rates[False]:.0f} tokens/s, {what}"
    yield Figure("decode beside unshared attention", rates[True] / rates[False], "times", detail, least=1.6)
    floor, took = floors.step(work.forks, len(work.prefix), 0), work.forks / rates[True]
    detail = f"a step takes {took * 1e3:.2f} ms; weights and shared KV at the copy's rate {floor * 1e3:.2f} ms"
    yield Figure("decode, share of the memory-bound rate", 100 * floor / took, "%", detail, least=80)


def _closing(run: Callable[[list[Sequence]], Branches]) -> Branches:
    opened: list[Sequence] = []
    try:
        return run(opened)
    finally:
        for sequence in opened:
            sequence.close()

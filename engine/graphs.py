"""Decoding at fixed addresses: a step over static buffers, captured as a CUDA graph for each batch size, and not waited
for, so that the host prepares the next step while it runs.

The LM head and the sampler are inside the step, and so is where its input comes from: a row's token is the one that a
row of the step before has sampled. What the rows share is in a work list of fixed size (kernels.paged_attention), so
another tree of forks is other numbers in the same buffers, and no other graph.
"""

from __future__ import annotations

from bisect import bisect_left
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.attention.ours import Ours, OursStep
from engine.batch import DecodeBatch
from engine.models import Qwen3VL
from kernels import PagedPlan, paged_plan, sample
from kernels.paged_attention import PlanOverflow, device_tile, fixed_paged_plan

if TYPE_CHECKING:
    from engine.scheduler import Request

WORKSPACE_BYTES = 1 << 28  # for partial results of attention; longer contexts are decoded without a graph
INTS = 7  # rows of the integer buffer: token, source, position, slot, seed, noise position, top-k


class Launched:
    """A step that may still run: whose rows it computes, and where its results will be.

    `ahead`: the batch's rows stand at the step after this one already.
    """

    def __init__(self, requests: list[Request], tokens: Tensor, scores: Tensor, done: torch.cuda.Event | None):
        self.requests = requests
        self.ahead = False
        self._tokens, self._scores, self._done = tokens, scores, done

    def results(self) -> tuple[npt.NDArray[np.int64], list[float], list[float]]:
        """Waits: token, log-prob and entropy of each row."""
        if self._done is not None:
            self._done.synchronize()
        logprobs, entropies = self._scores[:, : len(self.requests)].tolist()
        return self._tokens.numpy()[: len(self.requests)], logprobs, entropies

    def rows_of(self, requests: list[Request]) -> npt.NDArray[np.int64]:
        """The row of each of `requests`, all of which it computes."""
        if requests == self.requests:
            return np.arange(len(requests))
        row = {id(request): index for index, request in enumerate(self.requests)}
        return np.array([row[id(request)] for request in requests], dtype=np.int64)


@dataclass(slots=True)
class Bucket:
    """Decode steps of up to `rows` rows."""

    rows: int
    plan: PagedPlan
    max_context: int
    graph: torch.cuda.CUDAGraph | None = None


class DecodeGraphs:
    """Steps in which every sequence computes one token and no request shapes its logits.

    capture: as CUDA graphs. Otherwise the same function over the same buffers runs directly: how it is tested on a CPU.
    A batch is filled up to a bucket's size with copies of its first row, whose KV goes nowhere (slot -1).
    """

    def __init__(self, model: Qwen3VL, attention: Ours, banned: Tensor, max_rows: int, max_context: int, capture: bool):
        self.model, self.attention, self.banned, self.capture = model, attention, banned, capture
        self.max_context = max_context
        self.device = banned.device
        self.sizes = bucket_sizes(max_rows)
        columns = -(-max_context // attention.target.block_size)
        self.ints = torch.zeros(INTS, max_rows, dtype=torch.int64, device=self.device)
        self.floats = torch.zeros(3, max_rows, device=self.device)  # temperature, top-p, min-p
        self.tables = torch.zeros(max_rows, columns, dtype=torch.int32, device=self.device)
        self.lengths = torch.zeros(max_rows, dtype=torch.int32, device=self.device)
        self.starts = torch.arange(max_rows + 1, dtype=torch.int32, device=self.device)
        self.tokens = torch.zeros(max_rows, dtype=torch.int64, device=self.device)  # sampled by the last step
        self.scores = torch.zeros(2, max_rows, device=self.device)  # log-prob, entropy
        self._buckets: dict[int, Bucket] = {}
        self._addresses = self._parameter_addresses()
        self._pool: Any = None  # of memory, common to all graphs, as no two of them run at once
        self._stream: Any = None  # that warms up and captures: each has memory of its own in torch's allocator

    @property
    def captured(self) -> list[int]:
        """Batch sizes that have a graph."""
        return sorted(size for size, bucket in self._buckets.items() if bucket.graph is not None)

    def weights_updated(self) -> None:
        """Forgets the graphs if parameters were pointed at other storage; new values in the old need nothing."""
        if self._parameter_addresses() != self._addresses:
            self._addresses = self._parameter_addresses()
            self._buckets.clear()
            self._pool = None  # torch takes no graph into a pool that has lost its last one

    @torch.inference_mode()
    def launch(self, batch: DecodeBatch, before: Launched | None = None) -> Launched | None:
        """Begins a step over all rows of `batch`. Rows of `before`, which may still run, take their tokens from it.

        Returns None, having done nothing, when the step is not one of these.
        """
        with device_guard(self.device):
            return self._launch(batch, before)

    def _launch(self, batch: DecodeBatch, before: Launched | None) -> Launched | None:
        rows = len(batch)
        if not 0 < rows <= self.sizes[-1] or batch.shaped:
            return None
        bucket = self._bucket(self.sizes[bisect_left(self.sizes, rows)])
        lengths = np.resize((batch.position + 1).astype(np.int32), bucket.rows)
        lengths[rows:] = lengths[0]
        if lengths.max() > bucket.max_context:
            return None
        tables = batch.tables()
        tables = np.concatenate([tables, np.repeat(tables[:1], bucket.rows - rows, axis=0)])
        starts = np.arange(bucket.rows + 1, dtype=np.int32)
        heads, cache = self.attention.target.num_heads, self.attention.kv.layer(0)[0]
        try:
            share = self.attention.share_prefixes
            plan = paged_plan(tables, starts, lengths, heads, cache, share, into=bucket.plan)
        except PlanOverflow:
            return None
        source = np.full(rows, -1, dtype=np.int64) if before is None else before.rows_of(batch.requests)
        columns = (
            batch.token,
            source,
            batch.position + batch.delta,
            batch.slots(),
            batch.seed,
            batch.position + 1,
            batch.top_k,
        )
        ints = np.empty((INTS, bucket.rows), dtype=np.int64)
        ints[:, :rows] = columns
        ints[:, rows:] = ints[:, :1]
        ints[3, rows:] = -1
        floats = np.empty((3, bucket.rows), dtype=np.float32)
        floats[:, :rows] = batch.temperature, batch.top_p, batch.min_p
        floats[:, rows:] = floats[:, :1]
        self._upload(self.ints[:, : bucket.rows], ints)
        self._upload(self.floats[:, : bucket.rows], floats)
        self._upload(self.tables[: bucket.rows, : tables.shape[1]], tables)
        self._upload(self.lengths[: bucket.rows], lengths)
        self._run(bucket, plan)
        return self._launched(list(batch.requests), rows)

    def _compute(self, rows: int, plan: PagedPlan) -> None:
        """The step itself: reads and writes nothing but the buffers, the cache and the weights."""
        token, source, position, slots, seeds, noise, top_k = self.ints[:, :rows]
        temperature, top_p, min_p = self.floats[:, :rows]
        token = torch.where(source < 0, token, self.tokens[source.clamp(min=0)])
        attention = OursStep(
            self.attention.kv,
            self.tables[:rows],
            self.starts[: rows + 1],
            self.lengths[:rows],
            slots,
            None,
            self.attention.scale,
            plan,
            self.attention.whole_layers,
        )
        hidden = self.model(token, position.expand(3, rows), attention)
        logits = self.model.logits(hidden)
        tokens, logprobs, entropies = sample(logits, seeds, noise, temperature, top_k, top_p, self.banned, min_p)
        self.tokens[:rows].copy_(tokens)
        self.scores[0, :rows].copy_(logprobs)
        self.scores[1, :rows].copy_(entropies)

    def _run(self, bucket: Bucket, plan: PagedPlan) -> None:
        if not self.capture:
            self._compute(bucket.rows, plan)
            return
        if bucket.graph is None:
            bucket.graph = self._capture(bucket)
        bucket.graph.replay()

    def _capture(self, bucket: Bucket) -> torch.cuda.CUDAGraph:
        """Runs the step twice first, as kernels are compiled and libraries set up by their first call."""
        sampled = self.tokens.clone()
        current = torch.cuda.current_stream(self.device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                self._compute(bucket.rows, bucket.plan)
                self.tokens.copy_(sampled)  # the step's own input
        current.wait_stream(self._stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            self._compute(bucket.rows, bucket.plan)
        return graph

    def _bucket(self, rows: int) -> Bucket:
        if rows not in self._buckets:
            target = self.attention.target
            split = device_tile(self.device).split
            partial = rows * target.num_heads * (target.head_dim + 1) * 4  # bytes a split
            context = min(self.max_context, max(WORKSPACE_BYTES // partial, 1) * split)
            plan = fixed_paged_plan(rows, context, self.device, self.attention.share_prefixes)
            self._buckets[rows] = Bucket(rows, plan, context)
        return self._buckets[rows]

    def _upload(self, buffer: Tensor, values: np.ndarray) -> None:
        host = torch.from_numpy(np.ascontiguousarray(values))
        if self.device.type == "cuda":  # the caching host allocator keeps it until the transfer is over
            host = host.pin_memory()
        buffer.copy_(host, non_blocking=True)

    def _launched(self, requests: list[Request], rows: int) -> Launched:
        if self.device.type != "cuda":
            return Launched(requests, self.tokens[:rows].clone(), self.scores[:, :rows].clone(), None)
        tokens = torch.empty(rows, dtype=torch.int64, pin_memory=True).copy_(self.tokens[:rows], non_blocking=True)
        scores = torch.empty(2, rows, pin_memory=True).copy_(self.scores[:, :rows], non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Launched(requests, tokens, scores, done)

    def _parameter_addresses(self) -> tuple[int, ...]:
        return tuple(parameter.data_ptr() for parameter in self.model.parameters())


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, whose streams events and graphs take; another may be, where several are seen."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def bucket_sizes(most: int) -> list[int]:
    """Batch sizes that steps are filled up to: close together where a row more costs most."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most, 32)]
    return [size for size in sizes if size < most] + [most]

"""Time and memory of a call, and what the machine can do at most, measured in the same run."""

import statistics
import time
from collections.abc import Callable
from functools import cache

import torch

# Overwritten before every call: more than any GPU's L2, and so long to write (0.3 ms on an H100) that the host, which
# takes longer for a short backward pass than the GPU does, has launched the call before its clock starts.
L2_BYTES = 1 << 30


def gradient_call(function: Callable, arguments: tuple, inputs: int) -> Callable[[], tuple]:
    """The backward pass alone: gradients of the first `inputs` arguments through one forward pass that is kept."""
    leaves = [a.detach().requires_grad_() for a in arguments[:inputs]]
    outputs = function(*leaves, *arguments[inputs:])
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
    grads = [torch.randn(o.shape, dtype=torch.float32, device=o.device).to(o.dtype) for o in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def forward_call(function: Callable, arguments: tuple) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return function(*arguments)

    return call


def seconds(call: Callable[[], object], device: torch.device, graph: bool = False, budget: float = 0.4) -> float:
    """Median time of a call after two warm-up calls, within about `budget` seconds and at least 3 calls.

    On CUDA by events, with the L2 cache overwritten in between, so that inputs come from memory, and long enough that
    the host is ahead. graph: replays a CUDA graph of the call instead.
    """
    call()
    call()
    if device.type != "cuda":
        return _median(lambda: _host_time(call), budget)
    if graph:
        call = _captured(call)
    scratch = torch.empty(L2_BYTES, dtype=torch.int8, device=device)
    events = []
    torch.cuda.synchronize()
    deadline = time.perf_counter() + budget
    while len(events) < 3 or (time.perf_counter() < deadline and len(events) < 200):
        scratch.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
        if len(events) % 20 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def workspace_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak memory of a call beyond its inputs and its outputs; 0 on the CPU, where torch does not count."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = call()
    torch.cuda.synchronize()
    beyond = torch.cuda.max_memory_allocated() - max(torch.cuda.memory_allocated(), before)
    del outputs
    return beyond


@cache
def floors(device: torch.device) -> tuple[float, float]:
    """(bytes read and written a second by a large copy, fp operations a second of a large matrix product).

    Of bf16 and 8192³ on CUDA, of fp32 and 1024³ on the CPU.
    """
    on_cuda = device.type == "cuda"
    source = torch.zeros(1 << (31 if on_cuda else 27), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / seconds(lambda: target.copy_(source), device)
    n, dtype = (8192, torch.bfloat16) if on_cuda else (1024, torch.float32)
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    return rate, 2 * n**3 / seconds(lambda: a @ b, device)


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _host_time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _median(sample: Callable[[], float], budget: float) -> float:
    deadline = time.perf_counter() + budget
    times = [sample() for _ in range(3)]
    while time.perf_counter() < deadline:
        times.append(sample())
    return statistics.median(times)

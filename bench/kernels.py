"""Every kernel beside torch's own operation, torch.compile's and other libraries': `pytest bench/kernels.py [-k NAME]`.

On the CPU in fp32, where torch.compile takes a while per case (`-k "not compile"` leaves it out); with CUDA in bf16.
Each row's extra_info has the bytes and floating-point operations of the work, the floor (the larger of both at the
speed of a large copy and a large matrix product on this machine), and the share of it that was reached. On the CPU
small inputs stay in the cache between rounds, and the share may be above 1.
"""

import pytest
import torch

from bench.cases import CASES, Case, Shape, draw
from bench.measure import floors, forward_call, gradient_call

SHAPES = (
    Shape("mini", 1024, 1024, 1024, 256, 192, 64, 128, 4, 2, 32, 384, 551, 4),
    Shape("0.6b", 512, 32, 512, 16, 960, 64, 1024, 16, 8, 128, 3072, 151_936, 28),
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
ROWS = [
    pytest.param(case, mode, implementation, id=f"{case.name}-{mode}-{implementation}")
    for case in CASES
    for mode in ("forward", *("backward",) * (case.inputs > 0))
    for implementation in ("ours", *case.peer_names)
]


@pytest.mark.benchmark(min_rounds=3, min_time=1e-5, max_time=0.3)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize(("case", "mode", "implementation"), ROWS)
def test_kernel(benchmark, case: Case, mode: str, shape: Shape, implementation: str) -> None:
    if implementation in ("liger", "cce", "flex"):
        if DEVICE.type == "cpu":
            pytest.skip(f"{implementation} needs CUDA")
        pytest.importorskip({"liger": "liger_kernel", "cce": "cut_cross_entropy", "flex": "torch"}[implementation])
    arguments = draw(case, shape, DEVICE, DTYPE)
    work = getattr(case, mode)(*arguments)
    function = case.ours(arguments) if implementation == "ours" else case.peer(implementation)
    if implementation in case.prepare:
        arguments = case.prepare[implementation](*arguments)
    call = forward_call(function, arguments) if mode == "forward" else gradient_call(function, arguments, case.inputs)
    call()

    def run() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.name}, {shape.name}, {mode}"
    benchmark(run)
    floor = work.floor(*floors(DEVICE))
    benchmark.extra_info |= {"bytes": work.bytes, "flops": work.flops, "floor_s": floor}
    if benchmark.stats:  # not with --benchmark-disable
        benchmark.extra_info["share_of_floor"] = floor / benchmark.stats.stats.median

"""`kernels.linear` beside torch's product on the CPU, at a small model's projections: `python bench/linear.py`.

One thread, processor seconds, the two in turns over weights that do not fit into the cache together, the best of seven:
other work on the machine disturbs it little. The floor is a product of 1024 × 1024 fp32 matrices, measured in the same
turns; beside it stands how fast the weight was read.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.command import head, row
from kernels import linear
from kernels.linear import linear_reference

SHAPES = {"gate, up": (6144, 1024), "down": (1024, 3072), "q, k, v": (4096, 1024)}  # [N, K]
COPIES = 12  # of the weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512], help="of x")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    square = torch.randn(1024, 1024)
    columns = ["ours ms", "torch ms", "ours ×", "ours GFLOP/s", "floor GFLOP/s", "weight GB/s"]
    print(head(["dtype", "rows", "weight", *columns], text=(0, 2)))
    for dtype in args.dtype:
        for rows in args.rows:
            for name, (n, k) in SHAPES.items():
                weights = [torch.randn(n, k).to(getattr(torch, dtype)) for _ in range(COPIES if rows < 256 else 2)]
                x = torch.randn(rows, k).to(weights[0].dtype)
                ours, other, floor = best(
                    lambda x=x, weights=weights: [linear(x, weight) for weight in weights],
                    lambda x=x, weights=weights: [linear_reference(x, weight) for weight in weights],
                    lambda: square @ square,
                )
                ours, other = ours / len(weights), other / len(weights)
                times = [f"{ours * 1e3:.3f}", f"{other * 1e3:.3f}", f"{other / ours:.2f}"]
                rates = [
                    f"{flops / took / 1e9:.0f}" for flops, took in ((2 * rows * n * k, ours), (2 * 1024**3, floor))
                ]
                cells = [dtype, str(rows), f"{name} {n} × {k}", *times, *rates, f"{weights[0].nbytes / ours / 1e9:.1f}"]
                print(row(cells), flush=True)


def best(*functions: Callable[[], object], rounds: int = 7) -> list[float]:
    """The least processor seconds of each, called in turns."""
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, taken in zip(functions, times, strict=True):
            start = time.process_time()
            function()
            taken.append(time.process_time() - start)
    return [min(taken) for taken in times]


if __name__ == "__main__":
    main()

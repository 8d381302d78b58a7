"""Paged attention of K forks of a prefix, shared and not, beside its floor: `python bench/paged_attention.py`.

Decode: every sequence has one query, over a common prefix of P tokens and a tail of its own. Reported: the time of one
call (one layer), the bytes of keys and values that it must read, the floor (those bytes at the speed of a large copy,
measured in the same run), and the speed-up over the same call with sharing switched off. Results are compared bit
for bit. On a GPU the calls are replayed as a CUDA graph, and the caches are larger than L2 in turn.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kernels.paged_attention import PagedPlan, paged_attention, paged_plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, nargs="+", default=[512, 2048], help="P, shared tokens")
    parser.add_argument("--forks", type=int, nargs="+", default=[1, 4, 16], help="K, sequences")
    parser.add_argument("--tail", type=int, default=64, help="tokens of each sequence's own")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--backend", choices=["triton", "cpp", "reference"])
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and args.backend != "cpp" else "cpu")
    rate = copy_rate(device)
    rows = [
        measure(args, prefix, forks, DTYPES[dtype], device, rate)
        for dtype in args.dtype
        for prefix in args.prefix
        for forks in args.forks
    ]
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    if args.json:
        conditions = {k: str(v) for k, v in vars(args).items()} | {"torch": torch.__version__, "machine": machine}
        report = {"conditions": conditions, "copy_bytes_per_s": rate, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{machine}, {args.heads}/{args.kv_heads} heads, D {args.head_dim}, blocks of {args.block_size}, tails of "
        f"{args.tail}, {args.threads} threads; large copy {rate / 1e9:.1f} GB/s (read + written)"
    )
    print("| dtype | prefix | forks | shared µs | unshared µs | speed-up | KV MB | floor µs | shared / floor |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for r in rows:
        print(
            f"| {r['dtype']} | {r['prefix']} | {r['forks']} | {r['shared_s'] * 1e6:.0f} | {r['unshared_s'] * 1e6:.0f} "
            f"| {r['unshared_s'] / r['shared_s']:.2f} | {r['kv_bytes'] / 1e6:.1f} | {r['floor_s'] * 1e6:.0f} "
            f"| {r['shared_s'] / r['floor_s']:.2f} |"
        )


def measure(
    args: argparse.Namespace, prefix: int, forks: int, dtype: torch.dtype, device: torch.device, rate: float
) -> dict:
    size, context = args.block_size, prefix + args.tail
    shared = prefix // size
    own = -(-context // size) - shared
    blocks = shared + forks * own
    token_bytes = 2 * args.kv_heads * args.head_dim * dtype.itemsize
    copies = max(2, -(-(256 << 20) // (blocks * size * token_bytes)))  # layers in turn, so that no cache keeps one
    kv = torch.empty(copies, 2, blocks, args.kv_heads, size, args.head_dim, dtype=dtype, device=device).normal_()
    order = torch.randperm(blocks).int()
    tables = torch.cat([order[:shared].expand(forks, -1), order[shared:].view(forks, own)], dim=1).contiguous()
    starts = torch.arange(forks + 1, dtype=torch.int32)
    contexts = torch.full((forks,), context, dtype=torch.int32)
    q = torch.randn(forks, args.heads, args.head_dim, device=device).to(dtype)
    scale = args.head_dim**-0.5
    on_device = [x.to(device) for x in (tables, starts, contexts)]
    result, seconds = [], []
    for share in (True, False):
        plan = paged_plan(tables, starts, contexts, args.heads, kv[0, 0], share=share, backend=args.backend)

        def attend(layer: torch.Tensor, plan: PagedPlan = plan) -> torch.Tensor:
            return paged_attention(q, layer[0], layer[1], *on_device, scale, plan=plan, backend=args.backend)

        result.append(attend(kv[0]))
        seconds.append(timed(lambda: [attend(layer) for layer in kv], args.rounds, device) / copies)
    if not torch.equal(*result):
        raise AssertionError(f"sharing changed the result at P = {prefix}, K = {forks}, {dtype}")
    kv_bytes = (prefix + forks * args.tail) * token_bytes
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "prefix": prefix,
        "forks": forks,
        "shared_s": seconds[0],
        "unshared_s": seconds[1],
        "kv_bytes": kv_bytes,
        "floor_s": kv_bytes / rate,
    }


def timed(f: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Median seconds of f; on a GPU of its replay as a CUDA graph."""
    f()
    if device.type == "cpu":
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            f()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(rounds):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 512 MB."""
    a = torch.empty(1 << 29, dtype=torch.uint8, device=device).zero_()
    b = torch.empty_like(a)
    return 2 * a.nbytes / timed(lambda: b.copy_(a), 5, device)


if __name__ == "__main__":
    main()

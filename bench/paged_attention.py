"""What sharing saves in one call of paged attention: `python bench/paged_attention.py [--prefix P …] [--forks K …]`.

Decode of one layer: K sequences with one query each, over a common prefix of P tokens and a tail of their own. Each row
is the same call with sharing on and off, which must give the same bits, beside its floor: the keys and values read once
at the speed of a large copy, or the arithmetic at the speed of a large matrix product, both measured in the same run
(fp32 on the CPU, whose kernel computes in fp32). Calls go over so many layers in turn that no cache keeps one. With
--threads 1 it is processor time that counts, which whatever else runs on the machine lengthens less.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench.command import add_json, head, row, settings, write_json  # noqa: E402
from bench.measure import L2_BYTES, floors, seconds  # noqa: E402
from kernels.paged_attention import paged_attention, paged_plan  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = ("dtype", "prefix", "forks", "shared µs", "unshared µs", "speed-up", "KV MB", "MFLOP", "floor µs", "of it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, nargs="+", default=[512, 2048], metavar="P", help="shared tokens")
    parser.add_argument("--forks", type=int, nargs="+", default=[1, 4, 16], metavar="K", help="sequences")
    parser.add_argument("--tail", type=int, default=64, help="tokens of each sequence's own")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    parser.add_argument("--backend", choices=["triton", "cpp", "reference"])
    add_json(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and args.backend != "cpp" else "cpu")
    bytes_per_s, flops_per_s = floors(device) if args.threads > 1 or device.type == "cuda" else own_floors()
    rows = []
    for dtype in args.dtype:
        for prefix in args.prefix:
            for forks in args.forks:
                print(f"{dtype}, prefix {prefix}, {forks} forks …", file=sys.stderr, flush=True)
                rows.append(measure(args, prefix, forks, DTYPES[dtype], device))
                rows[-1]["floor_s"] = max(rows[-1]["kv_bytes"] / bytes_per_s, rows[-1]["flops"] / flops_per_s)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {platform.machine()}"
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "torch": torch.__version__,
        "arguments": settings(args),
        "copy_bytes_per_s": bytes_per_s,
        "matmul_flops_per_s": flops_per_s,
        "rows": rows,
    }
    write_json(args.json, report)
    print(
        f"{machine}, {args.threads} threads, {args.heads}/{args.kv_heads} heads, D {args.head_dim}, blocks of "
        f"{args.block_size}, tails of {args.tail}; copy {bytes_per_s / 1e9:.1f} GB/s, product "
        f"{flops_per_s / 1e9:.0f} GFLOP/s"
    )
    print(head(COLUMNS))
    for r in rows:
        times = f"{r['shared_s'] * 1e6:.0f}", f"{r['unshared_s'] * 1e6:.0f}", f"{r['unshared_s'] / r['shared_s']:.2f}"
        work = f"{r['kv_bytes'] / 1e6:.1f}", f"{r['flops'] / 1e6:.0f}"
        floor = f"{r['floor_s'] * 1e6:.0f}", f"{r['floor_s'] / r['shared_s']:.0%}"
        print(row([r["dtype"], r["prefix"], r["forks"], *times, *work, *floor]))


def measure(args: argparse.Namespace, prefix: int, forks: int, dtype: torch.dtype, device: torch.device) -> dict:
    size, context = args.block_size, prefix + args.tail
    shared, token_bytes = prefix // size, 2 * args.kv_heads * args.head_dim * dtype.itemsize
    own = -(-context // size) - shared
    blocks = shared + forks * own
    on_cpu = device.type == "cpu"
    layers = max(2, 2 * L2_BYTES // (blocks * size * token_bytes)) if on_cpu else 1  # on CUDA L2 is flushed instead
    kv = torch.empty(layers, 2, blocks, args.kv_heads, size, args.head_dim, dtype=dtype, device=device).normal_()
    order = torch.randperm(blocks).int()
    tables = torch.cat([order[:shared].expand(forks, -1), order[shared:].view(forks, own)], dim=1).contiguous()
    starts, contexts = torch.arange(forks + 1).int(), torch.full((forks,), context).int()
    q = torch.randn(forks, args.heads, args.head_dim, device=device).to(dtype)
    arguments = tables.to(device), starts.to(device), contexts.to(device), args.head_dim**-0.5
    result, took = [], []
    for share in (True, False):
        plan = paged_plan(tables, starts, contexts, args.heads, kv[0, 0], share=share, backend=args.backend)

        turn = cycle(kv)

        def call(plan=plan, turn=turn) -> torch.Tensor:
            k, v = next(turn)
            return paged_attention(q, k, v, *arguments, plan=plan, backend=args.backend)

        result.append(call())
        alone = on_cpu and args.threads == 1
        took.append(own_seconds(call, args.seconds) if alone else seconds(call, device, not on_cpu, args.seconds))
    if not torch.equal(*result):
        raise AssertionError(f"sharing changed the result at P = {prefix}, K = {forks}, {dtype}")
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "prefix": prefix,
        "forks": forks,
        "shared_s": took[0],
        "unshared_s": took[1],
        "kv_bytes": (prefix + forks * args.tail) * token_bytes,
        "flops": 4 * forks * context * args.heads * args.head_dim,
    }


def own_seconds(call: Callable[[], object], budget: float = 1.0) -> float:
    """Median processor time of a call on this thread."""
    times, deadline = [], time.perf_counter() + budget
    while len(times) < 10 or time.perf_counter() < deadline:
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return statistics.median(times[2:])


def own_floors() -> tuple[float, float]:
    """bench.measure.floors of one thread in processor time."""
    source, a = torch.zeros(1 << 28, dtype=torch.int8), torch.randn(1024, 1024)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / own_seconds(lambda: target.copy_(source))
    return rate, 2 * 1024**3 / own_seconds(lambda: a @ a)


if __name__ == "__main__":
    main()

"""Host memory of loading a checkpoint: the weights and one tensor more, never a second copy of the weights.

    python bench/loading.py [--shards N] [--json FILE]

Writes a random Qwen3 checkpoint of 0.75 B parameters (1.5 GB in bf16) in shards to build/models/, once, and loads it
in a process for each way: the engine in bf16, the engine in fp32 (every tensor is cast), the trainer's fp32 masters
from the meta device. The kernel holds the engine's processes to their weights, a tenth more, and one shard
(RLIMIT_DATA: torch maps a shard so that it counts there, read or not); `naive`, which reads all tensors and then copies
them, shows that the limit bites. The trainer is measured without one: FSDP2 keeps address space that it never touches.
Exit status 1: a way took more than a tenth above its weights, or `naive` fitted in.

peak: the most that the process had in memory, mapped pages of the checkpoint included, above what it had before.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.command import add_json, write_json  # noqa: E402
from bench.fork_models import MODELS, TextShape, write_random  # noqa: E402

SHAPE = TextShape(hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8, vocabulary=151_936, tied=False)
WAYS = ("engine bfloat16", "engine float32", "trainer float32", "naive bfloat16")
ALLOWED = 1.1  # times the weights
SLACK = 96 << 20  # the KV cache, threads, and what Python makes on the way


def load(way: str, path: Path) -> Any:
    """Loads the checkpoint; returns what holds the weights, a module or one with a `model`."""
    import torch

    from engine import LLM
    from engine.models import ModelConfig, Qwen3VL
    from engine.weights import copy_weights, read_tensors

    kind, dtype = way.split()
    if kind == "engine":
        return LLM(path, dtype=getattr(torch, dtype), kv_cache_bytes=1 << 24).model
    if kind == "naive":
        model = Qwen3VL(ModelConfig.from_pretrained(path)).to(getattr(torch, dtype))
        copy_weights(model, {name: tensor.clone() for name, tensor in read_tensors(path)})
        return model
    from axpo.sharding import build_model, load_sharded

    model = build_model(ModelConfig.from_pretrained(path), torch.bfloat16, torch.device("cpu"))
    load_sharded(model, path)
    return model


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) << 10


def weight_bytes(way: str, path: Path) -> int:
    """Of the model that the way makes."""
    import torch

    from engine.models import ModelConfig, Qwen3VL

    with torch.device("meta"):
        model = Qwen3VL(ModelConfig.from_pretrained(path))
    return sum(p.numel() for p in model.parameters()) * getattr(torch, way.split()[1]).itemsize


def worker(way: str, path: Path, small: Path) -> None:
    """Loads in this process, under the limit, and prints what it took. `small`: loaded before, for all that is once."""
    import gc

    from engine.weights import shards

    if way.startswith("trainer"):
        import torch

        from axpo.distributed import initialise

        initialise(torch.device("cpu"))
    load(way, small)
    gc.collect()
    weights = weight_bytes(way, path)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, held = status("VmRSS"), status("VmData")
    limit = held + int(ALLOWED * weights) + max(file.stat().st_size for file in shards(path)) + SLACK
    if way.startswith("trainer"):
        limit = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    began = time.perf_counter()
    found = {"way": way, "weights": weights, "limit": limit - held if limit > 0 else None, "error": None}
    try:
        model = load(way, path)
        total = sum(float(p.detach().flatten()[:1].sum()) for p in local_parameters(model))
        assert total == total, "NaN among the weights"
    except (MemoryError, RuntimeError) as error:
        found["error"] = str(error).splitlines()[0][:200]
    print(json.dumps(found | {"peak": status("VmHWM") - before, "seconds": time.perf_counter() - began}))


def local_parameters(model: Any) -> list[Any]:
    return [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]


def measure(way: str, path: Path, small: Path) -> dict[str, Any]:
    """One way in a process of its own. Raises RuntimeError when the process fails for another reason than memory."""
    command = [sys.executable, str(Path(__file__)), "--worker", way, str(path), str(small)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4, help="files of the checkpoint")
    add_json(parser)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        way, path, small = args.worker
        worker(way, Path(path), Path(small))
        return 0
    path, small = MODELS / f"loading-{args.shards}", MODELS / "loading-small"
    for directory, shape, shards in (
        (path, SHAPE, args.shards),
        (small, TextShape(64, 96, 1, 2, 1, 300, True), 1),
    ):
        if not (directory / "config.json").is_file():
            write_random(directory, shape, shards=shards)
    rows = []
    print(f"{'way':18}{'weights MB':>12}{'limit MB':>10}{'peak MB':>10}{'peak / weights':>16}{'s':>7}")
    for way in WAYS:
        row = measure(way, path, small)
        rows.append(row)
        limit = f"{row['limit'] / 1e6:.0f}" if row["limit"] else "none"
        sizes = f"{row['weights'] / 1e6:12.0f}{limit:>10}"
        took = row["error"] or f"{row['peak'] / 1e6:10.0f}{row['peak'] / row['weights']:16.2f}{row['seconds']:7.1f}"
        print(f"{way:18}{sizes}{'  ' if row['error'] else ''}{took}", flush=True)
    write_json(args.json, rows)
    fits = {row["way"]: row["error"] is None and row["peak"] <= ALLOWED * row["weights"] + SLACK for row in rows}
    return int(any(fit == way.startswith("naive") for way, fit in fits.items()))


if __name__ == "__main__":
    sys.exit(main())

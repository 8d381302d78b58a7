"""Tree attention on a shared prompt with rollouts, beside the same rollouts unshared and torch SDPA a sequence.

`python bench/tree_attention.py` measures the CPU case that the project holds itself to: 8 rollouts of 512 tokens behind
a prompt of 2048, 16 query and 8 KV heads of 128, fp32, two threads. On a GPU: `--device cuda --dtype bfloat16`, and
`--rollouts 1 --prompt 0 --response 16384` for plain causal attention. Rounds are interleaved, so that a change in the
machine's load meets every system; the figure is the best round.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.command import add_json, add_rounds, clock, head, row, settings, write_json
from kernels import tree_attention


@dataclass(frozen=True, slots=True)
class Row:
    """Best times in ms; visible: pairs (query, key) a head; gflops: of the products that the pairs need, a second."""

    system: str
    tokens: int
    visible: int
    forward_ms: float
    backward_ms: float
    forward_gflops: float
    backward_gflops: float

    @property
    def total_ms(self) -> float:
        return self.forward_ms + self.backward_ms


def forest(prompt: int, response: int, rollouts: int, shared: bool) -> torch.Tensor:
    """subtree_end of one prompt with its rollouts, or of as many sequences of prompt + response side by side."""
    if not shared:
        length = prompt + response
        return torch.arange(1, rollouts + 1).repeat_interleave(length) * length
    total = prompt + rollouts * response
    ends = prompt + torch.arange(1, rollouts + 1).repeat_interleave(response) * response
    return torch.cat([torch.full((prompt,), total), ends])


def draw(args: argparse.Namespace, tokens: int) -> tuple[torch.Tensor, ...]:
    """q, k, v as views of one fused projection, as the model makes them."""
    dtype, heads = getattr(torch, args.dtype), (args.heads, args.kv_heads, args.kv_heads)
    fused = torch.randn(tokens, sum(heads), args.dim, device=args.device, dtype=dtype).requires_grad_()
    return fused.split(heads, dim=1)


def ours(args: argparse.Namespace, shared: bool) -> tuple[Callable, tuple[torch.Tensor, ...], int]:
    end = forest(args.prompt, args.response, args.rollouts, shared).to(args.device)
    visible = int((end - torch.arange(len(end), device=end.device)).sum())
    scale = args.dim**-0.5
    backend = args.backend
    return lambda q, k, v: tree_attention(q, k, v, end, scale, backend=backend), draw(args, len(end)), visible


def sdpa(args: argparse.Namespace) -> tuple[Callable, tuple[torch.Tensor, ...], int]:
    length = args.prompt + args.response

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = [[part.transpose(0, 1)[None] for part in x.split(length)] for x in (q, k, v)]
        outs = [F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True) for x in zip(*parts, strict=True)]
        return torch.cat([x[0].transpose(0, 1) for x in outs])

    return call, draw(args, args.rollouts * length), args.rollouts * length * (length + 1) // 2


def timed(f: Callable, args: argparse.Namespace) -> tuple[float, torch.Tensor]:
    """Milliseconds and the result."""
    if args.device == "cpu":
        now = clock(args)
        begun = now()
        result = f()
        return (now() - begun) * 1e3, result
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = f()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop), result


def measure(args: argparse.Namespace) -> list[Row]:
    systems = {
        "tree, prompt shared": ours(args, True),
        "tree, unshared rows": ours(args, False),
        "torch SDPA, sequence by sequence": sdpa(args),
    }
    best = {name: [float("inf"), float("inf")] for name in systems}
    for turn in range(args.rounds + 1):  # the first warms up
        for name, (call, inputs, _) in systems.items():
            leaves = [x.detach().requires_grad_() for x in inputs]
            forward, out = timed(lambda: call(*leaves), args)  # noqa: B023
            grad = torch.randn_like(out)
            backward, _ = timed(lambda: torch.autograd.grad(out, leaves, grad), args)  # noqa: B023
            if turn:
                best[name] = [min(best[name][0], forward), min(best[name][1], backward)]
            print(f"round {turn}: {name}: forward {forward:.1f} ms, backward {backward:.1f} ms", file=sys.stderr)
    rows = []
    for name, (_, (q, *_), visible) in systems.items():
        forward, backward = best[name]
        work = (
            4e-6 * visible * args.heads * args.dim
        )  # two products of two operations an element; the backward has five
        rows.append(Row(name, q.shape[0], visible, forward, backward, work / forward, 2.5 * work / backward))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=2048, help="shared tokens")
    parser.add_argument("--response", type=int, default=512, help="own tokens of each rollout")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--backend", choices=("triton", "cpp", "reference"), help="of tree attention; default automatic"
    )
    add_rounds(parser, 5)
    add_json(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    tree, unshared, peer = rows = measure(args)
    ideal, reached = unshared.visible / tree.visible, unshared.total_ms / tree.total_ms
    ratios = {
        "ratio_of_visible_pairs": ideal,
        "speedup_by_sharing": reached,
        "share_of_ratio": reached / ideal,
        "forward_share_of_ratio": unshared.forward_ms / tree.forward_ms / ideal,
        "backward_share_of_ratio": unshared.backward_ms / tree.backward_ms / ideal,
        "unshared_time_over_sdpa": unshared.total_ms / peer.total_ms,
    }
    write_json(args.json, {"rows": [asdict(r) for r in rows], **ratios, "settings": settings(args)})
    columns = ["forward ms", "backward ms", "both ms", "forward GFLOP/s", "backward GFLOP/s"]
    print(head(["system", "tokens", *columns]))
    for r in rows:
        times = f"{r.forward_ms:.1f}", f"{r.backward_ms:.1f}", f"{r.total_ms:.1f}"
        print(row([r.system, r.tokens, *times, f"{r.forward_gflops:.0f}", f"{r.backward_gflops:.0f}"]))
    print(
        f"\nsharing: {reached:.2f} times as fast, {reached / ideal:.0%} of the ratio of visible pairs ({ideal:.2f}); "
        f"unshared rows take {unshared.total_ms / peer.total_ms:.2f} of torch SDPA's time"
    )


if __name__ == "__main__":
    main()

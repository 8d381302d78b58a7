"""Tree attention in Triton: launches of the kernels, and their operators axpo::triton_tree_attention (+ _backward)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels._triton import define, tiles
from kernels.aot import AotCase
from kernels.tree_attention import kernels
from kernels.tree_attention.plan import make_plan

KERNELS = ("forward", "query_gradient", "key_gradient")


def tree_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, subtree_end: torch.Tensor, scale: float
) -> torch.Tensor:
    """See kernels.tree_attention; on CUDA, or interpreted on the CPU. subtree_end is not checked: that would wait."""
    return _forward(q, k, v, subtree_end, scale)[0]


def _tile(name: str, dim: int, bytes_an_element: int, device: torch.device | str) -> dict[str, int]:
    """The tile of one kernel for heads padded to `dim`."""
    size = "fp32" if bytes_an_element == 4 else max(64, dim)
    rows, keys, warps, stages = tiles("tree_attention", device)[f"{name}_{size}"]
    return {"ROWS": rows, "KEYS": keys, "num_warps": warps, "num_stages": stages}


class Launch:
    """One kernel at its tile, for heads padded to `dim`, a power of two."""

    def __init__(self, name: str, q: torch.Tensor, kv_heads: int):
        self.kernel, self.dim = getattr(kernels, name), triton.next_power_of_2(q.shape[2])
        self.meta = _tile(name, self.dim, q.element_size(), q.device)
        self.meta |= {"GROUP": q.shape[1] // kv_heads, "DIM": self.dim}

    def queries(self, x: torch.Tensor) -> TensorDescriptor:
        return self._describe(x, self.meta["ROWS"])

    def keys(self, x: torch.Tensor) -> TensorDescriptor:
        return self._describe(x, self.meta["KEYS"])

    def _describe(self, x: torch.Tensor, rows: int) -> TensorDescriptor:
        """x [T, H, D] as a matrix of T rows; copied only where the hardware cannot read it in place."""
        if x.shape[2] != self.dim:
            x = F.pad(x, (0, self.dim - x.shape[2]))
        aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(0) > 0
        if not aligned or x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != self.dim):
            x = x.clone(memory_format=torch.contiguous_format)
        matrix = x.as_strided((x.shape[0], x.shape[1] * self.dim), (x.stride(0), 1))
        return TensorDescriptor.from_tensor(matrix, [rows, self.dim])

    def result(self, x: torch.Tensor) -> torch.Tensor:
        """Memory for a result like x, with padded heads."""
        return torch.empty(*x.shape[:2], self.dim, dtype=x.dtype, device=x.device)

    def __call__(self, heads: int, blocks_of: str, tokens: int, *arguments: Any) -> None:
        self.kernel[(heads, triton.cdiv(tokens, self.meta[blocks_of]))](*arguments, **self.meta)


def _run_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, subtree_end: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, dim = q.shape
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    if not tokens:
        return torch.empty_like(q, memory_format=torch.contiguous_format), lse
    launch, ends = Launch("forward", q, k.shape[1]), subtree_end.contiguous()
    out = launch.result(q)
    plan = make_plan(ends, launch.meta["ROWS"], launch.meta["KEYS"])
    launch(
        heads, "ROWS", tokens, launch.queries(q), launch.keys(k), launch.keys(v), ends, *plan, out, lse,
        tokens, plan.spans.shape[2], scale * math.log2(math.e),
    )  # fmt: skip
    return _cut(out, dim), lse


def _run_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    subtree_end: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    if not tokens:
        grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        return grad_q, grad_k, grad_v
    ends, grad_out, lse = subtree_end.contiguous(), grad_out.to(q.dtype), lse.contiguous()
    delta = torch.empty_like(lse)
    launch = Launch("query_gradient", q, kv_heads)
    grad_q, grad_k, grad_v = launch.result(q), launch.result(k), launch.result(v)
    plan = make_plan(ends, launch.meta["ROWS"], launch.meta["KEYS"])
    launch(
        heads, "ROWS", tokens, launch.queries(grad_out), launch.queries(out), launch.queries(q), launch.keys(k),
        launch.keys(v), ends, *plan, lse, delta, grad_q, tokens, plan.spans.shape[2], scale,
    )  # fmt: skip
    launch = Launch("key_gradient", q, kv_heads)
    launch(
        kv_heads, "KEYS", tokens, launch.queries(grad_out), launch.queries(q), launch.keys(k), launch.keys(v), ends,
        lse, delta, grad_k, grad_v, tokens, scale,
    )  # fmt: skip
    return _cut(grad_q, dim), _cut(grad_k, dim), _cut(grad_v, dim)


def _cut(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Without the padding, dense."""
    return x if x.shape[2] == dim else x[..., :dim].contiguous()


_forward = define(
    "triton_tree_attention(Tensor q, Tensor k, Tensor v, Tensor subtree_end, float scale) -> (Tensor, Tensor)",
    _run_forward,
    lambda q, k, v, subtree_end, scale: (
        q.new_empty(q.shape),
        q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32),
    ),
)
_backward = define(
    "triton_tree_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor subtree_end, Tensor out, "
    "Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    lambda grad_out, q, k, v, subtree_end, out, lse, scale: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)


def _save(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, subtree_end, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, subtree_end, out, lse)


def _differentiate(ctx: Any, grad_out: torch.Tensor | None, _: None) -> tuple:
    if grad_out is None:
        return None, None, None, None, None
    return *_backward(grad_out, *ctx.saved_tensors, ctx.scale), None, None


torch.library.register_autograd("axpo::triton_tree_attention", _differentiate, setup_context=_save)


def tune_candidates() -> list[dict[str, list[int]]]:
    """Tiles of each kernel for heads of 128, which bench/tune.py lays over the section of tiles.toml."""
    tiles_of = {
        "forward_128": [(128, keys, 8, stages) for keys in (64, 128) for stages in (2, 3)],
        "query_gradient_128": [(128, 64, 8, stages) for stages in (2, 3)] + [(64, 64, 4, 2), (64, 128, 4, 2)],
        "key_gradient_128": [(rows, 128, 8, stages) for rows in (32, 64) for stages in (2, 3)] + [(64, 64, 4, 2)],
    }
    return [{name: list(tile)} for name, candidates in tiles_of.items() for tile in candidates]


def aot_cases() -> list[AotCase]:
    """16 query and 8 KV heads of 128 and of 64, bf16."""
    return [_aot_case(name, dim, _tile(name, dim, 2, "sm_90")) for dim in (64, 128) for name in KERNELS]


def _aot_case(name: str, dim: int, tile: dict[str, int]) -> AotCase:
    kernel, signature = getattr(kernels, name), {}
    for argument in kernel.arg_names:
        if argument in ("q", "grad_out", "k", "v") or (argument == "out" and name == "query_gradient"):
            rows = tile["KEYS" if argument in ("k", "v") else "ROWS"]
            signature[argument] = f"tensordesc<bf16[{rows},{dim}]>"
        elif argument in ("tokens", "capacity"):
            signature[argument] = "i32"
        elif argument.startswith("scale"):
            signature[argument] = "fp32"
        elif argument in ("subtree_end", "spans", "counts"):
            signature[argument] = "*i32"
        else:
            signature[argument] = "*fp32" if argument in ("lse", "delta") else "*bf16"
    signature |= {"GROUP": 2, "DIM": dim, "ROWS": tile["ROWS"], "KEYS": tile["KEYS"]}
    aligned = tuple(n for n, t in signature.items() if isinstance(t, str) and t.startswith("*"))
    return AotCase(
        f"tree_attention_{name}_{dim}", kernel, signature, tile["num_warps"], tile["num_stages"], aligned, wgmma=True
    )

"""SwiGLU in Triton: one pass over the elements, in fp32, rounded once."""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels._triton import define, jit, load_rows, rows_of, tiles
from kernels.aot import AotCase


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See kernels.swiglu; on CUDA, or interpreted on the CPU."""
    return _swiglu(gate, up)


@jit
def _sigmoid(x):
    """Without overflow for any x."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@jit(do_not_specialize=["rows"])
def _forward(
    gate, g_inner, g_outer, g_step, up, u_inner, u_outer, u_step, y, rows,
    LENGTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows)[:, None] & (column < LENGTH)
    g = load_rows(gate, g_inner, g_outer, g_step, row, column, inside)
    u = load_rows(up, u_inner, u_outer, u_step, row, column, inside)
    to = (row.to(tl.int64) * LENGTH)[:, None] + column
    tl.store(y + to, (g * _sigmoid(g) * u).to(y.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows"])
def _backward(
    dy, d_inner, d_outer, d_step, gate, g_inner, g_outer, g_step, up, u_inner, u_outer, u_step, dgate, dup, rows,
    LENGTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With s = sigmoid(gate):  dup = dy gate s,  dgate = dy up s (1 + gate (1 − s))."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows)[:, None] & (column < LENGTH)
    d = load_rows(dy, d_inner, d_outer, d_step, row, column, inside)
    g = load_rows(gate, g_inner, g_outer, g_step, row, column, inside)
    u = load_rows(up, u_inner, u_outer, u_step, row, column, inside)
    s = _sigmoid(g)
    to = (row.to(tl.int64) * LENGTH)[:, None] + column
    tl.store(dgate + to, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + to, (d * g * s).to(dup.dtype.element_ty), mask=inside)


def _run_forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        grid, rows, meta = _launch(gate)
        _forward[grid](*rows_of(gate), *rows_of(up), y, rows, **meta)
    return y


def _run_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if dgate.numel():
        grid, rows, meta = _launch(gate)
        _backward[grid](*rows_of(grad), *rows_of(gate), *rows_of(up), dgate, dup, rows, **meta)
    return dgate, dup


def _launch(x: torch.Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    length = x.shape[-1]
    rows, meta = x.numel() // length, _tile(length, tiles("swiglu", x.device))
    return (triton.cdiv(rows, meta["ROWS"]), triton.cdiv(length, meta["BLOCK"])), rows, meta


def _tile(length: int, sizes: Any) -> dict[str, int]:
    block = min(triton.next_power_of_2(length), sizes["elements"])
    rows = sizes["elements"] // block
    warps = sizes["elements"] // (32 * sizes["per_thread"])
    return {"LENGTH": length, "ROWS": rows, "BLOCK": block, "num_warps": min(max(warps, 1), 16)}


_swiglu = define(
    "triton_swiglu(Tensor gate, Tensor up) -> Tensor", _run_forward, lambda gate, up: gate.new_empty(gate.shape)
)
_swiglu_backward = define(
    "triton_swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _run_backward,
    lambda grad, gate, up: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
)


def _save(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple:
    return _swiglu_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("axpo::triton_swiglu", _differentiate, setup_context=_save)


def tune_candidates() -> list[dict[str, int]]:
    """Parts of [sm_90.swiglu] that bench/tune.py measures."""
    return [{"elements": e, "per_thread": t} for e in (1024, 2048, 4096, 8192) for t in (8, 16, 32)]


def aot_cases() -> list[AotCase]:
    """The rows of a Qwen3 of I 12288."""
    cases = []
    for name, kernel in (("swiglu_forward", _forward), ("swiglu_backward", _backward)):
        meta = _tile(12288, tiles("swiglu", "sm_90"))
        warps = meta.pop("num_warps")
        signature: dict[str, Any] = dict.fromkeys(kernel.arg_names, "*bf16")
        for argument in signature:
            if argument.endswith(("_outer", "_step")) or argument == "rows":
                signature[argument] = "i32"
            elif argument.endswith("_inner"):  # dense rows, which Triton makes a constant
                signature[argument] = 1
        signature |= meta
        aligned = tuple(n for n, t in signature.items() if isinstance(t, str) and n != "rows")
        cases.append(AotCase(name, kernel, signature, warps, aligned=aligned))
    return cases

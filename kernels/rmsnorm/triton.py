"""RMSNorm in Triton: a row stays in registers; the weight's gradient is summed a program, then in program order."""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels._triton import define, jit, load_rows, rows_of, tiles
from kernels.aot import AotCase


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See kernels.rmsnorm; on CUDA, or interpreted on the CPU."""
    return _rmsnorm(x, weight, eps)


def add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels.rmsnorm; on CUDA, or interpreted on the CPU."""
    return _add_rmsnorm(x, residual, weight, eps)


@jit(do_not_specialize=["rows"])
def _forward(
    x, x_inner, x_outer, x_step,
    residual, r_inner, r_outer, r_step,
    weight, y, total, rows,
    LENGTH: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < LENGTH)
    w = tl.load(weight + column, mask=column < LENGTH, other=0.0).to(tl.float32)
    v = load_rows(x, x_inner, x_outer, x_step, row, column, inside)
    dense = (row.to(tl.int64) * LENGTH)[:, None] + column
    if ADD:
        v += load_rows(residual, r_inner, r_outer, r_step, row, column, inside)
        rounded = v.to(total.dtype.element_ty)  # the norm sees the sum as it is passed on
        tl.store(total + dense, rounded, mask=inside)
        v = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(v * v, 1) / LENGTH + EPS)
    normed = (v * inverse[:, None]).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + dense, (normed * w).to(y.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows"])
def _backward(
    dy, d_inner, d_outer, d_step,
    dtotal, t_inner, t_outer, t_step,
    x, x_inner, x_outer, x_step,
    weight, dx, partial, rows,
    LENGTH: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """With x̂ = x r and g = dy w:  dx = r (g − x̂ mean(g x̂)) + dtotal,  dw = Σ dy x̂."""
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + column, mask=column < LENGTH, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    first, step = tl.program_id(0), tl.num_programs(0)
    for tile in tl.range(first, tl.cdiv(rows, ROWS), step, num_stages=STAGES):  # pyright: ignore
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < LENGTH)
        v = load_rows(x, x_inner, x_outer, x_step, row, column, inside)
        g = load_rows(dy, d_inner, d_outer, d_step, row, column, inside)
        inverse = tl.rsqrt(tl.sum(v * v, 1) / LENGTH + EPS)[:, None]
        v *= inverse
        dw += g * v
        g *= w
        d = inverse * (g - v * (tl.sum(g * v, 1) / LENGTH)[:, None])
        if ADD:
            d += load_rows(dtotal, t_inner, t_outer, t_step, row, column, inside)
        tl.store(dx + (row.to(tl.int64) * LENGTH)[:, None] + column, d.to(dx.dtype.element_ty), mask=inside)
    at = partial + tl.program_id(0).to(tl.int64) * LENGTH + tl.arange(0, BLOCK)
    tl.store(at, tl.sum(dw, 0), mask=tl.arange(0, BLOCK) < LENGTH)


def _run_forward(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y if residual is None else torch.empty_like(y)
    if y.numel():
        length = x.shape[-1]
        meta = _tile("forward", length, tiles("rmsnorm", x.device))
        from_x = rows_of(x)
        from_residual = from_x if residual is None else rows_of(residual)
        rows = y.numel() // length
        _forward[(triton.cdiv(rows, meta["ROWS"]),)](
            *from_x, *from_residual, weight.contiguous(), y, total, rows,
            LENGTH=length, EPS=eps, ADD=residual is not None, **meta,
        )  # fmt: skip
    return y, total


def _run_backward(
    grad: torch.Tensor, grad_total: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, length = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1]
    if not dx.numel():
        return dx, torch.zeros_like(weight, memory_format=torch.contiguous_format)
    sizes = tiles("rmsnorm", x.device)
    meta = _tile("backward", length, sizes)
    rows = dx.numel() // length
    # Their number is in the file of tiles, not the GPU's of processors, so that the sum's order depends on the file.
    programs = min(triton.cdiv(rows, meta["ROWS"]), sizes["backward_programs"])
    partial = torch.empty(programs, length, dtype=torch.float32, device=x.device)
    from_grad = rows_of(grad)
    from_total = from_grad if grad_total is None else rows_of(grad_total)
    _backward[(programs,)](
        *from_grad, *from_total, *rows_of(x), weight.contiguous(), dx, partial, rows,
        LENGTH=length, EPS=eps, ADD=grad_total is not None, STAGES=sizes["backward_stages"], **meta,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


def _tile(name: str, length: int, sizes: Any) -> dict[str, int]:
    """Whole rows of about sizes[<name>_elements]. Depends on the length alone, so that a row's sum does too."""
    block = triton.next_power_of_2(length)
    rows = max(1, sizes[f"{name}_elements"] // block)
    warps = rows * block // (32 * sizes[f"{name}_per_thread"])
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(max(warps, 1), 16)}


_rmsnorm = define(
    "triton_rmsnorm(Tensor x, Tensor weight, float eps) -> Tensor",
    lambda x, weight, eps: _run_forward(x, None, weight, eps)[0],
    lambda x, weight, eps: x.new_empty(x.shape),
)
_add_rmsnorm = define(
    "triton_add_rmsnorm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _run_forward,
    lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
_rmsnorm_backward = define(
    "triton_rmsnorm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _run_backward,
    lambda grad, grad_total, x, weight, eps: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)


def _save(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple:
    return *_rmsnorm_backward(grad, None, *ctx.saved_tensors, ctx.eps), None


def _save_sum(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *_, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _differentiate_sum(ctx: Any, grad: torch.Tensor | None, grad_total: torch.Tensor | None) -> tuple:
    if grad is None:  # only the sum was used
        return grad_total, grad_total, None, None
    dx, dw = _rmsnorm_backward(grad, grad_total, *ctx.saved_tensors, ctx.eps)
    return dx, dx, dw, None


torch.library.register_autograd("axpo::triton_rmsnorm", _differentiate, setup_context=_save)
torch.library.register_autograd("axpo::triton_add_rmsnorm", _differentiate_sum, setup_context=_save_sum)


def tune_candidates() -> list[dict[str, int]]:
    """Parts of [sm_90.rmsnorm] that bench/tune.py measures, each laid over the best so far."""
    shapes = [(elements, per_thread) for elements in (2048, 4096, 8192) for per_thread in (8, 16, 32)]
    return [
        *({"forward_elements": e, "forward_per_thread": t} for e, t in shapes),
        *({"backward_elements": e, "backward_per_thread": t} for e, t in shapes),
        *({"backward_programs": p, "backward_stages": s} for p in (132, 264, 396, 528) for s in (1, 2, 3, 4)),
    ]


def aot_cases() -> list[AotCase]:
    """The hidden rows and the head rows of a Qwen3 of H 4096, D 128."""
    sizes, cases = tiles("rmsnorm", "sm_90"), []
    for length, add in ((4096, False), (4096, True), (128, False)):
        for way, kernel in (("forward", _forward), ("backward", _backward)):
            meta = _tile(way, length, sizes)
            warps = meta.pop("num_warps")
            signature: dict[str, Any] = dict.fromkeys(kernel.arg_names, "*bf16")
            for name in signature:
                if name.endswith(("_outer", "_step")) or name == "rows":
                    signature[name] = "i32"
                elif name.endswith("_inner"):  # dense rows have 1, which Triton makes a constant
                    signature[name] = "i32" if length == 128 else 1
            signature |= {"LENGTH": length, "EPS": 1e-6, "ADD": add} | meta
            if way == "backward":
                signature |= {"partial": "*fp32", "STAGES": sizes["backward_stages"]}
            aligned = tuple(n for n, t in signature.items() if isinstance(t, str) and n != "rows" and "inner" not in n)
            cases.append(AotCase(f"{'add_' * add}rmsnorm_{way}_{length}", kernel, signature, warps, aligned=aligned))
    return cases

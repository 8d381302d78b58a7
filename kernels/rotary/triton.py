"""Rotary position embedding in Triton: a program turns all heads of a token, whose angles it reads once."""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels._triton import define, jit, tiles
from kernels.aot import AotCase


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels.rotary; on CUDA, or interpreted on the CPU."""
    return _rotary(q, k, cos, sin, False)


@jit
def _turn(
    x, y, cos, sin, token, x_token, x_head,
    HEADS: tl.constexpr, HALF: tl.constexpr, HEAD_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token of [T, HEADS, 2 HALF]."""
    column = tl.arange(0, BLOCK)[None, :]
    head = tl.arange(0, HEAD_BLOCK)[:, None]
    inside = (head < HEADS) & (column < HALF)
    at = x + token * x_token + head.to(tl.int64) * x_head + column
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    to = y + (token * HEADS + head) * (2 * HALF) + column
    tl.store(to, (first * cos - second * sin).to(y.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (second * cos + first * sin).to(y.dtype.element_ty), mask=inside)


@jit
def _rotate(
    q, q_token, q_head, k, k_token, k_head, cos, sin, q_out, k_out,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    c = tl.load(cos + token * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    _turn(q, q_out, c, s, token, q_token, q_head, Q_HEADS, HALF, Q_BLOCK, BLOCK)
    _turn(k, k_out, c, s, token, k_token, k_head, K_HEADS, HALF, K_BLOCK, BLOCK)


def _run(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    tokens, half = cos.shape
    if tokens and half:
        q, k = (x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous() for x in (q, k))
        _rotate[(tokens,)](
            q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), cos.contiguous(), sin.contiguous(), q_out, k_out,
            **_tile(q.shape[1], k.shape[1], half, tiles("rotary", q.device)), INVERSE=inverse,
        )  # fmt: skip
    return q_out, k_out


def _tile(q_heads: int, k_heads: int, half: int, sizes: Any) -> dict[str, int]:
    q_block, k_block, block = map(triton.next_power_of_2, (q_heads, k_heads, half))
    warps = max(q_block, k_block) * block // (32 * sizes["per_thread"])
    return {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "HALF": half,
        "Q_BLOCK": q_block,
        "K_BLOCK": k_block,
        "BLOCK": block,
        "num_warps": min(max(warps, 1), 16),
    }


_rotary = define(
    "triton_rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    _run,
    lambda q, k, cos, sin, inverse: (q.new_empty(q.shape), k.new_empty(k.shape)),
)


def _save(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *_, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple:
    """The rotation is orthogonal: its gradient is the rotation by the opposite angle. cos and sin get none."""
    return *_rotary(dq, dk, *ctx.saved_tensors, not ctx.inverse), None, None, None


torch.library.register_autograd("axpo::triton_rotary", _differentiate, setup_context=_save)


def tune_candidates() -> list[dict[str, int]]:
    """Parts of [sm_90.rotary] that bench/tune.py measures."""
    return [{"per_thread": per_thread} for per_thread in (4, 8, 16, 32)]


def aot_cases() -> list[AotCase]:
    """The 32 and 8 heads of a Qwen3 of H 4096, D 128."""
    meta = _tile(32, 8, 64, tiles("rotary", "sm_90"))
    warps = meta.pop("num_warps")
    signature: dict[str, Any] = dict.fromkeys(_rotate.arg_names, "*bf16") | meta | {"INVERSE": False}
    signature |= {"cos": "*fp32", "sin": "*fp32"} | dict.fromkeys(("q_token", "q_head", "k_token", "k_head"), "i32")
    aligned = tuple(name for name, type in signature.items() if isinstance(type, str))
    return [AotCase("rotary", _rotate, signature, warps, aligned=aligned)]

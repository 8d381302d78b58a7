"""Attention over a packed tree of token runs, where a token is seen by its own subtree: forward and backward."""

import torch

from kernels._library import LOADED, choose
from kernels.tree_attention.reference import tree_attention_reference

__all__ = ["tree_attention", "tree_attention_reference"]

CPP_DTYPES = (torch.float32, torch.bfloat16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    subtree_end: torch.Tensor,
    scale: float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention in which query i sees key t iff t <= i < subtree_end[t]. Returns [T, Hq, D] in the dtype of q.

    q: [T, Hq, D]; k, v: [T, Hk, D] with Hq a multiple of Hk (query head h reads KV head h * Hk // Hq).
    subtree_end: [T] int32 or int64, t < subtree_end[t] <= T: one past the last packed token of the subtree headed by
    t's run, in depth-first order. Independent sequences side by side are the special case of trees of one run.
    scale: factor on the scores before the softmax.
    backend: "triton" (16 to 256 elements a head in steps of 16, scale > 0, fp32, bf16 or fp16), "cpp" (up to 256
    elements in steps of 8, fp32 or bf16) or "reference"; by default the fastest that serves the call.
    Differentiable in q, k and v. Sums are taken in fp32 or better and in a fixed order: the result and the gradients
    are the same bits in every run and for any number of threads. Raises ValueError for shapes that do not fit, and,
    outside of "triton", which would have to wait for the GPU to look, for a subtree_end that does not.
    """
    _check(q, k, v, subtree_end)
    dim, same = q.shape[2], q.dtype == k.dtype == v.dtype
    chosen = choose(
        "tree_attention",
        backend,
        q,
        k,
        v,
        cpp=same and dim % 8 == 0 and dim <= 256,
        cpp_dtypes=CPP_DTYPES,
        triton=same and q.dtype in TRITON_DTYPES and dim % 16 == 0 and 0 < dim <= 256 and scale > 0,
    )
    if chosen == "triton":
        from kernels.tree_attention import triton

        return triton.tree_attention(q, k, v, subtree_end, scale)
    if chosen == "cpp":
        return torch.ops.axpo.tree_attention(q, k, v, subtree_end, scale)[0]
    return tree_attention_reference(q, k, v, subtree_end, scale)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, subtree_end: torch.Tensor) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"tree_attention: q {tuple(q.shape)} must be [T, Hq, D], and k {tuple(k.shape)} and v {tuple(v.shape)} "
            "[T, Hk, D] with the same T and D"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"tree_attention: {q.shape[1]} query heads are not a multiple of {k.shape[1]} KV heads")
    if subtree_end.shape != q.shape[:1] or subtree_end.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"tree_attention: subtree_end {tuple(subtree_end.shape)} {subtree_end.dtype} must be int32 or int64 of "
            f"shape ({q.shape[0]},)"
        )


def _fake_forward(q, k, v, subtree_end, scale):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _fake_backward(grad_out, q, k, v, subtree_end, out, lse, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, subtree_end, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, subtree_end, out, lse)


def _backward(ctx, grad_out, grad_lse):
    if grad_out is None:
        return None, None, None, None, None
    q, k, v, subtree_end, out, lse = ctx.saved_tensors
    grads = torch.ops.axpo.tree_attention_backward(grad_out, q, k, v, subtree_end, out, lse, ctx.scale)
    return *grads, None, None


if LOADED:
    torch.library.register_fake("axpo::tree_attention", _fake_forward)
    torch.library.register_fake("axpo::tree_attention_backward", _fake_backward)
    torch.library.register_autograd("axpo::tree_attention", _backward, setup_context=_save)

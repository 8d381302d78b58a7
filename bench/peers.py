"""The same operations as other libraries have them, with the arguments of ours.

Imports are inside, as none of the libraries but torch need be installed. Where a peer computes less (no entropy, a
gradient that skips small terms) its docstring says so.
"""

# These libraries are optional: most machines have none of them.
# pyright: reportMissingImports=false

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def liger_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)


def liger_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """It turns in place and wants the angles twice, [1, T, D]."""
    from liger_kernel.ops.rope import LigerRopeFunction

    twice = [torch.cat((a, a), -1)[None] for a in (cos, sin)]
    turned = LigerRopeFunction.apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *twice)
    return turned[0][0].transpose(0, 1), turned[1][0].transpose(0, 1)


def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def liger_logprob_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Its own kernel where CUTLASS's Python DSL is installed, chunks of 512 rows in torch elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels, return_entropy=True)
    return -nll, entropy


def cce_logprob(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """No entropy; its gradient leaves out blocks in which all is below a threshold."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none")


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float) -> Tensor:
    """Of one sequence."""
    q, k, v = _batched(q, k, v)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def unshare(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float) -> tuple:
    """Half the tokens and eight equal rollouts, every rollout with a prompt of its own: [8, heads, T, D]."""
    run = len(q) // 16
    rows = torch.stack([torch.cat((torch.arange(8 * run), torch.arange(run) + (8 + i) * run)) for i in range(8)])
    return *(x.detach()[rows.to(x.device)].transpose(1, 2).contiguous() for x in (q, k, v)), scale


def unshared_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float) -> Tensor:
    run, masks = _flex()
    if subtree_end.data_ptr() not in masks:
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(_b: Any, _h: Any, i: Tensor, t: Tensor) -> Tensor:
            return (t <= i) & (i < subtree_end[t])

        masks[subtree_end.data_ptr()] = create_block_mask(visible, None, None, len(q), len(q), device=q.device)
    out = run(*_batched(q, k, v), block_mask=masks[subtree_end.data_ptr()], scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


@cache
def _flex() -> tuple[Any, dict[int, Any]]:
    """The compiled function, and the masks that were made, which a training step would make once for all layers."""
    from torch.nn.attention import flex_attention

    return torch.compile(flex_attention.flex_attention, dynamic=False), {}


def gathered_sdpa(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, starts: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """One query a sequence, all of as many tokens as their blocks: these are copied out, then torch's attention."""
    k, v = (c[tables.long()].transpose(1, 2).flatten(2, 3) for c in (k_cache, v_cache))
    return F.scaled_dot_product_attention(q[:, :, None], k, v, scale=scale, enable_gqa=True)[:, :, 0]


def multinomial(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:
    """Other noise than ours, so other tokens."""
    logp = torch.log_softmax(logits / temperature[:, None], -1)
    p = logp.exp()
    token = torch.multinomial(p, 1)
    return token[:, 0], logp.gather(1, token)[:, 0], -(p * logp).sum(-1)


def _batched(*tensors: Tensor) -> list[Tensor]:
    """[T, heads, D] as [1, heads, T, D]."""
    return [x.transpose(0, 1)[None] for x in tensors]

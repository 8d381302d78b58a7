"""Activation checkpointing: what a layer keeps of its forward pass, and what the backward pass computes again."""

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

Mode = Literal["none", "selective", "full"]

ATTENTION = ("tree_attention", "triton_tree_attention")
"""Our attention operators, of which a build or a device may have only some."""


def checkpoint_layers(layers: nn.ModuleList, mode: Mode) -> None:
    """Makes every layer keep less until its backward pass; the results stay the same bits.

    none: everything that autograd asks for. selective: the outputs of matrix products and of attention; norms, rotary
    and activations, which cost little, are computed again. full: the layer's input only.
    """
    if mode == "none":
        return
    contexts = {} if mode == "full" else {"context_fn": _keep_products}
    for layer in layers:
        # There is no dropout, hence no random state to restore. FSDP's hooks stand around `forward`: what is computed
        # again finds the layer's weights gathered for its backward pass.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, **contexts)


def _keep_products() -> Any:
    aten = torch.ops.aten
    products = [aten.mm.default, aten.addmm.default]
    sdpa = [
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ]
    # Looked for at every call: the Triton operator is defined when it is first used.
    ours = [getattr(torch.ops.axpo, name).default for name in ATTENTION if hasattr(torch.ops.axpo, name)]
    return create_selective_checkpoint_contexts([*products, *sdpa, *ours])

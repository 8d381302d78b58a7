"""Projections of the same input computed as one: q, k, v and gate, up lie one behind the other in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.models.qwen3_vl import MLP, DecoderLayer, Qwen3VL, SelfAttention


def to_empty(model: Qwen3VL, device: torch.device) -> Qwen3VL:
    """As `Module.to_empty`, with fused projections in one piece each, where `fuse_projections` finds them adjacent.

    The parameters stay separate under their own names; only where they lie is new. Of sharded parameters (DTensors) the
    shards lie so.
    """
    places: dict[int, Tensor] = {}
    for group in adjacent_parameters(model):
        parameters = [getattr(module, name) for module, name in group]
        local = [getattr(parameter, "_local_tensor", parameter) for parameter in parameters]
        rows = [len(tensor) for tensor in local] if len(local) > 1 else []
        if rows:
            whole = torch.empty(sum(rows), *local[0].shape[1:], dtype=local[0].dtype, device=device)
            places |= {id(parameter): part for parameter, part in zip(parameters, whole.split(rows), strict=True)}

    def empty(tensor: Tensor) -> Tensor:
        part = places.get(id(tensor))
        if part is None:
            return torch.empty_like(tensor, device=device)
        if not hasattr(tensor, "_local_tensor"):
            return part
        from torch.distributed.tensor import DTensor

        assert isinstance(tensor, DTensor)
        sizes = {"shape": tensor.shape, "stride": tensor.stride()}
        return DTensor.from_local(part, tensor.device_mesh, tensor.placements, run_check=False, **sizes)

    return model._apply(empty)


def fuse_projections(model: Qwen3VL) -> None:
    """Lets `model` compute adjacent projections in one product; those that are not adjacent are computed one by one.

    To be called again when parameters were pointed at other storage. For inference: gradients would not find their way
    to the single parameters.
    """
    for module, projections in _groups(model).items():
        weight = _adjacent([projection.weight for projection in projections])
        biases = [projection.bias for projection in projections if projection.bias is not None]
        bias = _adjacent(biases) if biases else None
        module.fused = None if weight is None or (biases and bias is None) else (weight, bias)
    for layer in _layers(model):
        attention, mlp = layer.self_attn, layer.mlp
        if attention.fused is None or mlp.fused is None:
            layer.fused = None
            continue
        (qkv, qkv_bias), o = attention.fused, attention.o_proj
        norms = layer.input_layernorm, attention.q_norm, attention.k_norm, layer.post_attention_layernorm
        first, q_norm, k_norm, second = (norm.weight.data for norm in norms)
        weights = [first, qkv, q_norm, k_norm, o.weight.data, second, mlp.fused[0], mlp.down_proj.weight.data]
        layer.fused = weights, (qkv_bias, None if o.bias is None else o.bias.data), layer.input_layernorm.eps


def adjacent_parameters(model: Qwen3VL) -> list[list[tuple[nn.Module, str]]]:
    """All parameters as (module, name): of a fused projection in one group, to lie in one piece; then the rest."""
    groups: list[list[tuple[nn.Module, str]]] = [
        [(projection, name) for projection in projections]
        for projections in _groups(model).values()
        for name in ("weight", "bias")
        if getattr(projections[0], name) is not None
    ]
    grouped = {parameter for group in groups for parameter in group}
    every = [(module, name) for module in model.modules() for name, _ in module.named_parameters(recurse=False)]
    groups += [[parameter] for parameter in every if parameter not in grouped]
    return groups


def _layers(model: Qwen3VL) -> list[DecoderLayer]:
    return [layer for layer in model.model.language_model.layers if isinstance(layer, DecoderLayer)]


def _groups(model: Qwen3VL) -> dict[SelfAttention | MLP, list[nn.Linear]]:
    groups: dict[SelfAttention | MLP, list[nn.Linear]] = {}
    for layer in _layers(model):
        attention, mlp = layer.self_attn, layer.mlp
        groups[attention] = [attention.q_proj, attention.k_proj, attention.v_proj]
        groups[mlp] = [mlp.gate_proj, mlp.up_proj]
    return groups


def _adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """One view over contiguous tensors that lie one behind the other in one storage, or None."""
    first = tensors[0].data
    at = first.data_ptr()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and tensor.is_contiguous() and tensor.data_ptr() == at):
            return None
        at += tensor.numel() * tensor.element_size()
    rows = sum(len(tensor) for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())

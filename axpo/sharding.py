"""The sharded model: built on the meta device, sharded by FSDP2, filled from a checkpoint or drawn."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication

from axpo.activations import Mode, checkpoint_layers
from axpo.distributed import all_reduce, world_size
from engine.models import ModelConfig, Qwen3VL, VisionFeatures, to_empty
from engine.weights import check_names, stored_tensors

# FSDP2 hooks the backward pass onto a module's outputs; before torch 2.12 it looks only into registered containers.
torch.export.register_dataclass(VisionFeatures)


def check_replicas(replicas: int) -> None:
    """Raises ValueError when the ranks of this run cannot be divided into `replicas` equal groups."""
    if world_size() % replicas:
        fitting = ", ".join(str(count) for count in range(1, world_size() + 1) if world_size() % count == 0)
        raise ValueError(
            f"train.replicas = {replicas}: {world_size()} ranks cannot be divided into that many equal groups; "
            f"set it to one of {fitting}, or start another number of ranks"
        )


def build_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    replicas: int = 1,
    checkpointing: Mode = "none",
    trained: bool = True,
    freeze_vision: bool = False,
    offload: bool = False,
) -> Qwen3VL:
    """The model with fp32 parameters, sharded, not yet filled. It computes in `dtype` and reduces gradients in fp32.

    FSDP2 gathers one decoder layer, one vision block, or what is left of the tower or the model at a time.

    Args:
        replicas: groups of consecutive ranks (nodes, say) that each hold the whole model in shards (HSDP).
        checkpointing: see `checkpoint_layers`; only layers that are trained need it.
        trained: False for a model without gradients.
        freeze_vision: the vision tower keeps its weights.
        offload: the shards lie in host memory, and on the device only while a layer computes.
    """
    check_replicas(replicas)
    with torch.device("meta"):
        model = Qwen3VL(config)
    if buffers := [name for name, _ in model.named_buffers()]:
        raise ValueError(f"buffers {buffers} would be left undefined here: compute them in forward")
    layers = model.model.language_model.layers
    visual = model.model.visual if config.vision is not None else None
    model.requires_grad_(trained)
    if trained:
        checkpoint_layers(layers, checkpointing)
    if visual is not None and freeze_vision:
        visual.requires_grad_(False)
    elif visual is not None and trained:
        checkpoint_layers(visual.blocks, checkpointing)

    mesh = _mesh(device, replicas)
    # Inputs are not cast: rotary tables must stay fp32.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    shard = partial(fully_shard, mesh=mesh, mp_policy=precision, offload_policy=policy)
    for layer in layers:
        shard(layer)
    if visual is not None:
        for block in visual.blocks:
            shard(block)
        shard(visual)
    shard(model, reshard_after_forward=True)
    place = torch.device("cpu") if offload else device
    if world_size() == 1:
        return to_empty(model, place)  # an engine that aliases these parameters computes projections fused
    return model.to_empty(device=place)


def _mesh(device: torch.device, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",))
    shape = (replicas, world_size() // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def reshard(model: torch.nn.Module) -> None:
    """Back to shards: after a forward without gradients FSDP2 may leave the root's parameters gathered."""
    assert isinstance(model, FSDPModule)
    model.reshard()


def reduce_over_replicas(model: torch.nn.Module, now: bool) -> None:
    """Whether the next backward pass ends in the sum over replicas, or leaves the gradients of this one to a later."""
    assert isinstance(model, FSDPModule)
    model.set_requires_all_reduce(now)


@torch.no_grad()
def load_sharded(model: Qwen3VL, path: str | Path) -> int:
    """Fills the sharded parameters from a checkpoint directory and returns the bytes that this rank read.

    A rank reads the rows of its own shards. Of several replicas the first reads and sends them to the others, so that
    every byte is read by one rank of the job.

    Raises:
        FileNotFoundError, ValueError: as `load_weights`; the same on every rank, before anything is filled.
    """
    parameters = dict(model.named_parameters())
    check_names(parameters, path)
    read = 0
    for name, stored in stored_tensors(path):
        if (parameter := parameters.get(name)) is None:
            continue
        assert isinstance(parameter, DTensor)
        mesh, local = parameter.device_mesh, parameter.to_local()
        if not len(local):  # fewer rows than ranks
            continue
        replicated = mesh.ndim == 2
        if not replicated or mesh.get_local_rank("replicate") == 0:
            start = mesh.get_local_rank("shard") * -(-len(parameter) // mesh.size(mesh.ndim - 1))  # as torch.chunk cuts
            rows = stored[start : start + len(local)]
            local.copy_(rows)
            read += rows.nbytes
            del rows  # and with it its mapping, before the next one
        if replicated:
            sent = local.to(mesh.device_type)
            dist.broadcast(sent, group=mesh.get_group("replicate"), group_src=0)
            local.copy_(sent)
    return read


@torch.no_grad()
def copy_shards(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """The weights of a model that is sharded in the same way; nothing is read or sent."""
    for ours, theirs in zip(source.parameters(), target.parameters(), strict=True):
        assert isinstance(ours, DTensor) and isinstance(theirs, DTensor)
        theirs.to_local().copy_(ours.to_local())


@torch.no_grad()
def draw_weights(model: Qwen3VL, seed: int) -> None:
    """Fresh weights, alike for any number of ranks.

    Matrices N(0, 1/fan_in), those that write to a residual stream smaller by √(number of writers); embeddings N(0, 1);
    norms 1, biases 0. The last norm is 1/√H when the head is tied, so that the first logits have variance 1.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    depth = {"visual": config.vision.depth if config.vision else 1, "language_model": config.text.num_layers}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            tied_norm = config.tie_word_embeddings and name.endswith("language_model.norm.weight")
            value = config.text.hidden_size**-0.5 if tied_norm else float(name.endswith("weight"))
            full = torch.full(parameter.shape, value)
        else:
            fan_in = 1 if "embed_tokens" in name or "pos_embed" in name else math.prod(parameter.shape[1:])
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.linear_fc2.weight"))
            writers = 2 * depth["visual" if ".visual." in name else "language_model"] if writes else 1
            full = torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in * writers)
        with implicit_replication():
            parameter.copy_(full)


def global_norm(gradients: Sequence[Tensor]) -> float:
    """Euclidean norm over all gradients and all their shards. Replicas hold the same shards, which count once."""
    shards, replicas = [], 1
    for gradient in gradients:
        assert isinstance(gradient, DTensor)
        shards.append(gradient.to_local())
        replicas = gradient.device_mesh.size(0) if gradient.device_mesh.ndim == 2 else 1
    if shards[0].is_cuda:  # without copies in fp64, and with one wait for all
        norms = torch.stack([torch.linalg.vector_norm(shard, dtype=torch.float64) for shard in shards])
        squares = norms.square().sum().item()
    else:
        squares = sum(shard.double().square().sum().item() for shard in shards)
    return math.sqrt(all_reduce(squares, shards[0].device) / replicas)

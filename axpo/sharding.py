"""The sharded model: built on the meta device, sharded by FSDP2, filled from a checkpoint or drawn."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication

from axpo.distributed import all_reduce, world_size
from engine.models import ModelConfig, Qwen3VL, VisionFeatures, pack_projections
from engine.weights import load_weights

# FSDP2 hooks the backward pass onto a module's outputs; before torch 2.12 it looks only into registered containers.
torch.export.register_dataclass(VisionFeatures)


def build_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Qwen3VL:
    """The model with fp32 parameters sharded over all ranks and not yet filled; it computes in `dtype`."""
    with torch.device("meta"):
        model = Qwen3VL(config)
    if buffers := [name for name, _ in model.named_buffers()]:
        raise ValueError(f"buffers {buffers} would be left undefined here: compute them in forward")
    mesh = init_device_mesh(device.type, (world_size(),))
    # Inputs are not cast: rotary tables must stay fp32.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    if config.vision is not None:
        fully_shard(model.model.visual, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    model = model.to_empty(device=device)
    if world_size() == 1:
        pack_projections(model)  # an engine that aliases these parameters computes them fused
    return model


def reshard(model: torch.nn.Module) -> None:
    """Back to shards: after a forward without gradients FSDP2 may leave the root's parameters gathered."""
    assert isinstance(model, FSDPModule)
    model.reshard()


def load_sharded(model: Qwen3VL, path: str | Path) -> None:
    """Fills the sharded parameters from a checkpoint directory: each rank reads the files and keeps its shards."""
    with implicit_replication():
        load_weights(model, path)


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
    """Euclidean norm over all gradients and all their shards; parameters are sharded over every rank."""
    shards = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    squares = sum(shard.double().square().sum().item() for shard in shards)
    return math.sqrt(all_reduce(squares, shards[0].device))

"""AdamW over sharded parameters, with its two moments on the device or, between steps, in host memory."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from axpo.config import Optim

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, optim: "Optim", *, offload: bool = False) -> torch.optim.AdamW:
    """AdamW over what is trained of a sharded model: matrices decay, norms and biases do not.

    To be made after sharding and before any forward, since it must hold the sharded parameters.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    make = OffloadedAdamW if offload else torch.optim.AdamW
    return make(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


class OffloadedAdamW(torch.optim.AdamW):
    """torch's AdamW whose moments live in (pinned) host memory and visit the device one parameter at a time.

    A step moves 16 bytes a parameter over the bus and computes the same bits. The state dict is AdamW's.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    moments = _moments(self.state[parameter])
                    host = [_local(moment) for moment in moments]
                    for moment, kept in zip(moments, host, strict=True):
                        _set_local(moment, kept.to(_local(parameter).device, non_blocking=True, copy=True))
                    self.param_groups = [{**group, "params": [parameter]}]
                    super().step()
                    moments = _moments(self.state[parameter])  # made by the first step, on the device
                    host = host or [_local(moment) for moment in moments]
                    host = [kept if kept.device.type == "cpu" else _host_like(kept) for kept in host]
                    for moment, kept in zip(moments, host, strict=True):
                        _set_local(moment, kept.copy_(_local(moment), non_blocking=True))
        finally:
            self.param_groups = groups
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the host reads the moments when a checkpoint is written


def _moments(state: dict[str, Tensor]) -> list[Tensor]:
    return [state[name] for name in MOMENTS if name in state]


def _host_like(local: Tensor) -> Tensor:
    return torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor._local_tensor.detach()


def _set_local(tensor: Tensor, local: Tensor) -> None:
    """As FSDP's own offload does: the shard moves, the distributed tensor around it stays."""
    assert isinstance(tensor, DTensor)
    tensor._local_tensor = local

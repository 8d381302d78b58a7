"""The engine's weights: loaded into one piece of memory, which can be given back and taken again."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from engine.arena import ALIGNMENT, make_arena, view
from engine.models import ModelConfig, Qwen3VL, adjacent_parameters, fuse_projections
from engine.weights import copy_weights, load_weights

LoadFormat = Literal["auto", "dummy"]
"""auto reads the weights; dummy leaves them unfilled, for a caller that brings them."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compute_dtype(given: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """A dtype or its name; None is bf16 on CUDA and fp32 on the CPU. Raises ValueError for what does not compute."""
    if given is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    dtype = names.get(given) if isinstance(given, str) else given
    if dtype not in DTYPES:
        raise ValueError(f"dtype={given!r}: give one of {', '.join(names)}, or None for the device's own")
    return dtype


class ResidentWeights:
    """A model whose parameters lie in one arena; what a fused projection multiplies lies in one piece.

    `absent` names the parameters without values: never read, or given back by `sleep` and not given anew.
    """

    def __init__(
        self, config: ModelConfig, path: Path, dtype: torch.dtype, device: torch.device, load_format: LoadFormat
    ):
        if load_format not in get_args(LoadFormat):
            raise ValueError(f"load_format={load_format!r}: give one of {', '.join(get_args(LoadFormat))}")
        with torch.device("meta"):  # no memory before the parameters' own
            self.model = Qwen3VL(config).to(dtype).requires_grad_(False).eval()
        self.path = path
        self.absent: set[str] = set()
        groups = adjacent_parameters(self.model)
        sizes = [sum(getattr(module, name).nbytes for module, name in group) for group in groups]
        starts = [0]
        for size in sizes:
            starts.append(-(-(starts[-1] + size) // ALIGNMENT) * ALIGNMENT)
        self._arena = make_arena(starts[-1], device)
        flat = self._arena.bytes()
        self._range = range(flat.data_ptr(), flat.data_ptr() + starts[-1])
        for group, start in zip(groups, starts, strict=False):
            for module, name in group:
                meta = getattr(module, name)
                setattr(module, name, nn.Parameter(view(flat, start, tuple(meta.shape), dtype), requires_grad=False))
                start += meta.nbytes
        fuse_projections(self.model)
        if load_format == "auto":
            load_weights(self.model, path)
        else:
            self.absent = set(dict(self.model.named_parameters()))

    @property
    def asleep(self) -> bool:
        return not self._arena.held

    @property
    def nbytes(self) -> int:
        """Bytes held now; parameters that were pointed at a trainer's storage are the trainer's."""
        return self._arena.nbytes

    def sleep(self) -> None:
        """Gives the memory back, and so the values, but for parameters that were pointed at other storage."""
        if not self.asleep:
            self.absent = {name for name, p in self.model.named_parameters() if p.data_ptr() in self._range}
            self._arena.release()

    def wake(self) -> None:
        self._arena.restore()

    def update(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        self._check_awake()
        self.absent -= copy_weights(self.model, tensors)

    def reload(self) -> None:
        self._check_awake()
        load_weights(self.model, self.path)
        self.absent.clear()

    def are_given(self) -> None:
        """All have values, which were put into them in place."""
        self._check_awake()
        self.absent.clear()

    def check(self) -> None:
        """Raises RuntimeError when there is nothing to compute with."""
        self._check_awake()
        if self.absent:
            raise RuntimeError(
                f"{len(self.absent)} weights have no values, {min(self.absent)} among them, as after sleep(level=2); "
                "give them by update_weights(), or read the checkpoint by reload_weights()"
            )

    def _check_awake(self) -> None:
        if self.asleep:
            raise RuntimeError("the engine's weights are asleep; call wake_up() first")

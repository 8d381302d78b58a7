"""What the Triton kernels share: `jit`, which also runs on CPU tensors, and `tiles`, the frozen tile sizes.

triton.jit makes a function either compiled or interpreted for the whole process, by an environment variable that is
read when the function is defined. `jit` decides at each launch instead: CUDA tensors run the compiled kernel, CPU
tensors Triton's own interpreter, which is exact and slow, and how the kernels are tested without a GPU. Compiling ahead
of time sees an ordinary JITFunction.
"""

import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

TILES = Path(__file__).with_name("tiles.toml")


def jit(fn: Callable | None = None, *, fp_fusion: bool = True, **options: Any) -> Any:
    """triton.jit whose kernels also take CPU tensors, and launch on the device of their first tensor.

    fp_fusion: whether a·b + c may be contracted to one rounding. Off for results that must equal another
    implementation's bit for bit. Stated at every launch, as Triton's default depends on its version.
    """
    if fn is None:
        return lambda fn: Kernel(fn, fp_fusion, options)
    return Kernel(fn, fp_fusion, options)


def tiles(op: str, device: torch.device | str) -> Mapping[str, Any]:
    """The tile sizes of `op`: section [default.<op>] of tiles.toml, and over it [<architecture>.<op>] ("sm_90").

    device: where the tensors are, or an architecture's name. Raises KeyError for an operation without a section.
    """
    return _tiles(op, device if isinstance(device, str) else _architecture(device.type, device.index))


class Rows(NamedTuple):
    """The rows of a tensor [..., H] with a dense last dimension: row r is at (r // inner) · outer + (r % inner) · step.

    A view of some heads of a fused projection, or of one half of it, is so read in place.
    """

    tensor: torch.Tensor
    inner: int
    outer: int
    step: int


def rows_of(x: torch.Tensor) -> Rows:
    """x as rows; copied only when its last dimension is not dense, or more than two others are strided."""
    if (x.shape[-1] > 1 and x.stride(-1) != 1) or (x.dim() > 3 and not x.is_contiguous()):
        x = x.contiguous()
    if x.dim() == 3 and not x.is_contiguous():
        return Rows(x, x.shape[1], x.stride(0), x.stride(1))
    return Rows(x, 1, x.stride(0) if x.dim() == 2 else x.shape[-1], 0)


def define(schema: str, implementation: Callable, fake: Callable) -> Any:
    """Registers `implementation` as torch.ops.axpo.<name> on the CPU (interpreted) and CUDA; returns the operator.

    The plain definition costs half of what torch.library.custom_op does a call, which shows when decoding.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"axpo::{name}", fake, lib=_library)
    return getattr(torch.ops.axpo, name).default


_library = torch.library.Library("axpo", "FRAGMENT")


class Kernel(JITFunction):
    """A JITFunction whose launches on CPU tensors go to the interpreter."""

    def __init__(self, fn: Callable, fp_fusion: bool, options: dict[str, Any]):
        super().__init__(fn, **options)
        self.fp_fusion = fp_fusion
        self.interpreted = interpreter.InterpretedFunction(fn)

    def run(self, *args, grid, warmup, **kwargs):
        kwargs.setdefault("enable_fp_fusion", self.fp_fusion)
        tensor = _first_tensor((*args, *kwargs.values()))  # none when warming up with types instead of tensors
        if knobs.runtime.interpret or (tensor is not None and tensor.is_cpu and not warmup):
            with _interpreting():
                return self.interpreted.run(*args, grid=grid, warmup=warmup, **kwargs)
        if tensor is None or not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
            return super().run(*args, grid=grid, warmup=warmup, **kwargs)
        with torch.cuda.device(tensor.device):
            return super().run(*args, grid=grid, warmup=warmup, **kwargs)


def _first_tensor(values: tuple) -> torch.Tensor | None:
    for value in values:
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(base := getattr(value, "base", None), torch.Tensor):  # a TensorDescriptor
            return base
    return None


@jit
def load_rows(x, inner, outer, step, row, column, inside):
    """Elements column [1, C] of rows row [R] of some Rows in fp32; 0 where not inside [R, C].

    row is int32, as a division of 64 bits would take longer than the load.
    """
    quotient = row // inner
    offset = quotient.to(tl.int64) * outer + (row - quotient * inner).to(tl.int64) * step
    return tl.load(x + offset[:, None] + column, mask=inside, other=0.0).to(tl.float32)


_lock = threading.RLock()


@contextmanager
def _interpreting() -> Iterator[None]:
    """Makes triton.language, and jitted functions called from a kernel, interpreted; undone afterwards.

    The interpreter patches the modules that a kernel's file imports, and forgets to restore those of the functions it
    calls (tl.sum and its like live in another file). Patching both modules here, first, makes its own patches void.
    It truncates to bf16, and multiplies the bit patterns of bf16 matrices as integers: here both are as on a GPU.
    """
    with _lock:
        scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        # Outside of this, calling one only raises an error, and x.sum() is not a bound method.
        scope.set_attr(JITFunction, "__call__", lambda self, *args, **kwargs: _rewritten(self.fn)(*args, **kwargs))
        scope.set_attr(JITFunction, "__get__", lambda self, x, owner=None: self if x is None else partial(self, x))
        scope.set_attr(interpreter, "_convert_float", _convert_float)
        scope.set_attr(interpreter.InterpreterBuilder, "create_dot", _create_dot)
        try:
            yield
        finally:
            scope.restore()


_theirs = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot


def _convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
    """Between fp32 and bf16 (kept as uint16), to the nearest and of two such to the even one; others as they were."""
    if source == tl.bfloat16 and target == tl.float32:
        return np.asarray(data, np.uint32) << 16
    if source == tl.float32 and target == tl.bfloat16:
        bits = np.asarray(data).view(np.uint32)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, nearest).astype(np.uint16)
    return _theirs[0](data, source, target, rounding)


def _create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
    a, b = (builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _theirs[1](builder, a, b, *rest)


@cache
def _rewritten(fn: Callable) -> Callable:
    return interpreter.InterpretedFunction(fn).rewrite()


@lru_cache
def _architecture(kind: str, index: int | None) -> str:
    if kind != "cuda":
        return "default"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


@lru_cache
def _tiles(op: str, architecture: str) -> Mapping[str, Any]:
    sections = tomllib.loads(TILES.read_text())
    if op not in sections["default"]:
        raise KeyError(f"{TILES} has no section [default.{op}]")
    return MappingProxyType(sections["default"][op] | sections.get(architecture, {}).get(op, {}))

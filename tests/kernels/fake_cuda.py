"""CUDA without a GPU: torch's fake tensors on "cuda", under which our operators run the code that launches on a GPU.

What runs is all that the host does there: allocations, views, strides, tensor descriptors, grids. Kernels are recorded
instead of launched, and can be compiled exactly as that launch would have them. Of results there are only shapes, so
what would wait for the device, `item()` or a comparison on the host, raises; and so do operands that are not on the
device. torch's CPU build cannot record a graph for autograd of such tensors: `backward` calls our rules instead.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import _triton, aot
from kernels.linear_logprob_entropy.chunked import gradients, setup_context

DEVICE = torch.device("cuda", 0)
GRID = (2**31 - 1, 65_535, 65_535)  # the largest of each dimension
MULTIPROCESSORS = 132


def _rules() -> dict[str, tuple[Any, Any]]:
    """By operator: what autograd keeps of a call, and the rule that it calls with that."""
    norm, head, rotary, swiglu, tree = (
        import_module(f"kernels.{name}.triton")  # of which the packages show the function that has their name
        for name in ("rmsnorm", "linear_logprob_entropy", "rotary", "swiglu", "tree_attention")
    )
    return {
        "triton_rmsnorm": (norm._save, norm._differentiate),
        "triton_add_rmsnorm": (norm._save_sum, norm._differentiate_sum),
        "triton_rotary": (rotary._save, rotary._differentiate),
        "triton_swiglu": (swiglu._save, swiglu._differentiate),
        "triton_tree_attention": (tree._save, tree._differentiate),
        "triton_linear_logprob_entropy": (setup_context, gradients(head.backward)),
    }


@dataclass(frozen=True, slots=True)
class Compiled:
    """One form of a kernel that was launched: bytes spilled a thread, and of shared memory a block."""

    name: str
    spill_bytes: int
    shared_bytes: int


class Launches(TorchDispatchMode):
    """What runs on the fake device. architecture: compile each launch for it ("sm_90"), else only record its kernel."""

    def __init__(self, architecture: str | None = None):
        super().__init__()
        self.architecture = architecture
        self.kernels: list[str] = []
        self.operators: list[str] = []  # torch's
        self.calls: list[tuple[str, tuple, Any]] = []  # our operators: name, arguments, result
        self.compiled: dict[str, Compiled] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "axpo":  # not its fake form: the one that launches
            with self:  # a mode is off in its own handler
                result = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
            self.calls.append((func._opname, args, result))
            return result
        self.operators.append(func._opname)
        if func._opname in ("mm", "addmm", "addmm_") and func._schema.is_mutable:
            result = kwargs.get("out", args[0])  # its fake form ends in a copy, which torch's CPU build refuses
        else:
            result = func(*args, **kwargs)
        flat = torch.utils._pytree.tree_leaves((args, kwargs, result))
        places = {x.device.type for x in flat if isinstance(x, torch.Tensor) and x.dim()}
        if len(places) > 1 or "cpu" in places:
            raise AssertionError(f"{func} has tensors on {', '.join(sorted(places))}: it waits for the device")
        return result

    def launch(self, kernel: _triton.Kernel, args: tuple, kwargs: dict[str, Any], grid: Any) -> None:
        grid = grid(kwargs) if callable(grid) else grid
        assert all(isinstance(n, int) and 1 <= n <= most for n, most in zip(grid, GRID, strict=False)), grid
        for value in (*args, *kwargs.values()):
            tensor = value.base if isinstance(value, TensorDescriptor) else value
            assert not isinstance(tensor, torch.Tensor) or tensor.device == DEVICE, f"{kernel.fn} gets {tensor.device}"
        self.kernels.append(kernel.fn.__name__)
        if self.architecture is None:
            return
        kwargs.setdefault("enable_fp_fusion", kernel.fp_fusion)
        args, kwargs = tuple(map(_pointer, args)), {name: _pointer(value) for name, value in kwargs.items()}
        form = JITFunction.run(kernel, *args, grid=grid, warmup=True, **kwargs)
        assert form is not None
        if form.hash not in self.compiled:
            usage, _ = aot._inspect(form.asm["cubin"])
            spilled = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
            self.compiled[form.hash] = Compiled(kernel.fn.__name__, spilled, form.metadata.shared)


def _pointer(value: Any) -> Any:
    """A tensor as Triton's binder wants it, with the dtype and the alignment that the launch would have."""
    if not isinstance(value, torch.Tensor):
        return value
    pointer = MockTensor(value.dtype)
    pointer.data_ptr = lambda: value.data_ptr() % 16  # type: ignore[method-assign]
    return pointer


def backward(launches: Launches) -> None:
    """The backward pass of every call so far that has one."""
    rules = _rules()
    for name, inputs, output in list(launches.calls):
        if name in rules:
            save, rule = rules[name]
            ctx = SimpleNamespace(needs_input_grad=(True,) * len(inputs), mark_non_differentiable=lambda *x: None)
            ctx.save_for_backward = lambda *tensors, to=ctx: setattr(to, "saved_tensors", tensors)
            ctx.set_materialize_grads = lambda value: None
            save(ctx, inputs, output)
            rule(ctx, *(torch.empty_like(x) for x in (output if isinstance(output, tuple) else (output,))))


def _getitem(x: torch.Tensor, key: Any) -> torch.Tensor:
    """x[key] by operators, as in METHODS: a torch without CUDA refuses to do it for tensors that say they are there."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in (every := [k for k in keys if not isinstance(k, torch.Tensor)]):
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        keys[at : at + 1] = [slice(None)] * (x.dim() - len(keys) + 1 + every.count(None))
    dim, index = 0, []
    for k in keys:
        if isinstance(k, int):
            x = x.select(dim, k)
            continue
        if isinstance(k, slice):
            x = torch.ops.aten.slice.Tensor(x, dim, k.start, k.stop, 1 if k.step is None else k.step)
        elif k is None:
            x = x.unsqueeze(dim)
        index.append(k if isinstance(k, torch.Tensor) else None)
        dim += 1
    return x if all(k is None for k in index) else torch.ops.aten.index.Tensor(x, index)


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_contiguous() else torch.ops.aten.clone.default(x, memory_format=torch.contiguous_format)


def _float(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float32 else torch.ops.aten._to_copy.default(x, dtype=torch.float32)


def _copy(x: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return torch.ops.aten.copy_.default(x, source, non_blocking)


METHODS = {"__getitem__": _getitem, "contiguous": _contiguous, "float": _float, "copy_": _copy}


class _Driver:
    """What Triton's compiler asks of a driver. One number a device and architecture, as launches are cached by it."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@contextmanager
def fake_cuda(architecture: str = "sm_90", compiling: bool = False) -> Iterator[Launches]:
    """Inside, tensors are fake, those on "cuda" on such a GPU; inside of what is yielded, nothing may wait for it."""
    number = int(architecture.removeprefix("sm_"))
    launches = Launches(architecture if compiling else None)

    def run(kernel: _triton.Kernel, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.launch(kernel, args, kwargs, grid)

    def address(tensor: torch.Tensor) -> int:  # torch's allocator begins tensors at multiples of 512 bytes
        return 1 << 20 | tensor.storage_offset() * tensor.element_size()

    properties = mock.Mock(multi_processor_count=MULTIPROCESSORS)
    with ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        patch(_triton.Kernel, "run", run)
        patch(FakeTensor, "data_ptr", address)
        for name, method in METHODS.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, method, create=True))
        patch(torch.Tensor, "pin_memory", lambda tensor: tensor)
        patch(torch.cuda, "get_device_capability", lambda device=None: divmod(number, 10))
        patch(torch.cuda, "get_device_properties", lambda device: properties)
        patch(driver, "_active", _Driver(number))
        _triton._architecture.cache_clear()
        stack.callback(_triton._architecture.cache_clear)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield launches

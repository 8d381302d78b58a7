"""Which implementation serves a call: Triton on CUDA, C++ (torch.ops.axpo.*) on the CPU, plain torch everywhere."""

import os
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

BACKENDS = ("triton", "cpp", "reference")
MODES = ("auto", *BACKENDS)


def _read_mode() -> str:
    mode = os.environ.get("AXPO_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(f"AXPO_KERNELS={mode!r} is not one of {', '.join(MODES)}: set one of these or unset it")
    return mode


def _load(mode: str) -> bool:
    """Loads kernels/_csrc*.so unless the mode is "reference". Returns whether the operators are there."""
    if mode == "reference":
        return False
    libraries = sorted(Path(__file__).parent.glob("_csrc*.so"))
    if not libraries:
        if mode == "cpp":
            raise ImportError(
                f"AXPO_KERNELS=cpp, but there is no _csrc*.so in {Path(__file__).parent}: "
                "build it with `python setup.py build_ext --inplace`"
            )
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:  # built against another torch: still usable, only slower
        message = f"{libraries[0]} cannot be loaded ({error}): rebuild it with `python setup.py build_ext --inplace`"
        if mode == "cpp":
            raise ImportError(f"AXPO_KERNELS=cpp, but {message}") from error
        warnings.warn(f"using the slower plain-torch kernels, as {message}", stacklevel=2)
        return False
    return True


MODE = _read_mode()
LOADED = _load(MODE)
TRITON = find_spec("triton") is not None


FP32 = (torch.float32,)
FP32_BF16 = (torch.float32, torch.bfloat16)


def choose(
    op: str,
    backend: str | None,
    *tensors: torch.Tensor | None,
    cpp: bool = True,
    triton: bool = True,
    cpp_dtypes: tuple[torch.dtype, ...] = FP32,
) -> str:
    """The backend that serves this call of `op`: "triton", "cpp" or "reference".

    backend: an explicit choice, which comes before AXPO_KERNELS, which comes before the automatic one.
    tensors: the floating-point operands (None is passed over); integer operands follow their device.
    cpp, triton: whether that implementation knows the shapes at hand; cpp_dtypes: what the C++ one takes.
    An explicit "triton" on CPU tensors runs Triton's interpreter (kernels/_triton.py), which is slow.
    Raises ValueError when the explicit choice cannot serve the call. The automatic one falls back to "reference".
    """
    wanted = backend or MODE
    if wanted == "auto":
        if tensors[0] is not None and tensors[0].is_cuda:
            return "triton" if TRITON and triton else "reference"
        return "cpp" if cpp and use_cpp(*tensors, dtypes=cpp_dtypes) else "reference"
    reason = _why_not(wanted, tensors, cpp and use_cpp(*tensors, dtypes=cpp_dtypes), triton, cpp_dtypes)
    if reason:
        source = "backend" if backend else "AXPO_KERNELS"
        raise ValueError(f"{op}: {source}={wanted!r} cannot serve this call: {reason}")
    return wanted


def use_cpp(*tensors: torch.Tensor | None, dtypes: tuple[torch.dtype, ...] = FP32) -> bool:
    """Whether the C++ operators are loaded and every tensor (None is passed over) is on the CPU, of one of `dtypes`."""
    if not LOADED:
        return False
    for t in tensors:  # noqa: SIM110 - a plain loop: this runs some sixty times a step of the engine
        if t is not None and not (t.is_cpu and t.dtype in dtypes):
            return False
    return True


def one_narrow_dtype(*tensors: torch.Tensor) -> bool:
    """Whether all have the same dtype of at most 32 bits, as the element-wise Triton kernels expect."""
    return tensors[0].dtype != torch.float64 and all(t.dtype == tensors[0].dtype for t in tensors)


def _why_not(
    backend: str,
    tensors: tuple[torch.Tensor | None, ...],
    cpp: bool,
    triton: bool,
    dtypes: tuple[torch.dtype, ...],
) -> str | None:
    if backend not in BACKENDS:
        return f"there is {', '.join(BACKENDS)}"
    if backend == "triton":
        if not TRITON:
            return "triton is not installed"
        if not triton:
            return "the Triton kernel does not know this shape or dtype"
        if not all(t is None or t.is_cuda or t.is_cpu for t in tensors):
            return "the Triton kernels run on CUDA tensors, and in Triton's interpreter on CPU tensors"
    if backend == "cpp":
        if not LOADED:
            return "the C++ kernels are not built (python setup.py build_ext --inplace)"
        if not cpp:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"the C++ kernel serves {names} tensors on the CPU, of shapes that its docstring names"
    return None


def why_not_amx() -> str | None:
    """Why products of bf16 on the CPU do not use AMX, the processor's matrix unit; None when they do.

    Chosen once a process; AXPO_AMX is auto (or unset), off, emulate (its arithmetic in C++, for tests) or assume (an
    emulator traps the instructions). Raises ValueError for another value.
    """
    if not LOADED:
        return "the C++ kernels are not built; python setup.py build_ext --inplace"
    return torch.ops.axpo.why_not_amx() or None

"""Loads the C++ CPU kernels (torch.ops.axpo.*) and decides, call by call, whether they can be used."""

import os
import warnings
from pathlib import Path

import torch

MODES = ("auto", "reference", "cpp")


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


def use_cpp(*tensors: torch.Tensor | None) -> bool:
    """Whether the C++ operators are loaded and every given tensor (None is passed over) is fp32 on the CPU.

    Integer operands (indices, lengths) need not be passed: they follow the device of the others.
    """
    return LOADED and all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors)

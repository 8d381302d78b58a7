"""Which form of the LM head serves a call."""

import torch

from kernels._library import MODE, choose

CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def implementation(op: str, backend: str | None, hidden: torch.Tensor, weight: torch.Tensor) -> str:
    """ "triton", "chunked" or "reference"; the last only on request, as it needs the memory that the others save."""
    chosen = choose(
        op,
        backend,
        hidden,
        weight,
        triton=hidden.dtype in TRITON_DTYPES and weight.dtype == hidden.dtype,
        cpp_dtypes=CPP_DTYPES,
    )
    if chosen == "triton" or (backend or MODE) == "reference":
        return chosen
    return "chunked"

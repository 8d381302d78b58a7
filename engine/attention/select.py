"""Which attention backend an engine takes: decided once, with a reason for each that it does not take."""

import warnings
from dataclasses import dataclass

import torch

from engine.attention.backend import Backend, Target
from engine.attention.flash_attn import FlashAttention
from engine.attention.ours import Ours
from engine.attention.sdpa import SDPA
from engine.attention.xformers import XFormers
from kernels._library import why_not_amx

BACKENDS: dict[str, type[Backend]] = {b.name: b for b in (Ours, FlashAttention, XFormers, SDPA)}  # best first


@dataclass(frozen=True, slots=True)
class Choice:
    backend: type[Backend]
    explanation: str


def choose_backend(name: str, target: Target) -> Choice:
    """The backend called `name`, or for "auto" the first that can serve.

    An automatic choice that is not the first is said in a warning.

    Raises:
        ValueError: there is no such backend, or it cannot serve; says why and what would help.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"attention={name!r} is not one of auto, {', '.join(BACKENDS)}")
    reasons = {backend.name: backend.why_not(target) for backend in BACKENDS.values()}
    if name != "auto" and reasons[name] is not None:
        raise ValueError(f"attention={name!r} cannot serve this engine: {reasons[name]}")
    taken = name if name != "auto" else next(other for other, reason in reasons.items() if reason is None)
    first = next(iter(BACKENDS))
    if name == "auto" and taken != first:
        warnings.warn(f"attention: {taken!r} is taken, as {first!r} cannot serve: {reasons[first]}", stacklevel=3)
    how = "the best that can serve" if name == "auto" else "asked for"
    lines = [f"attention: {taken} ({how}) — {BACKENDS[taken].about}"]
    for other, reason in reasons.items():
        if other != taken:
            lines.append(f"  not {other}: {reason or f'it could serve, and is taken with attention={other!r}'}")
    if target.device.type == "cpu" and target.dtype == torch.bfloat16:
        reason = why_not_amx()
        lines.append(f"bf16 products: {'AMX' if reason is None else f'widened to fp32, without AMX: {reason}'}")
    return Choice(BACKENDS[taken], "\n".join(lines))

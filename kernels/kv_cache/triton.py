"""Cache writes in Triton: the keys and values of a step, and copy-on-write of all layers in one launch."""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels._triton import jit, tiles
from kernels.aot import AotCase


@jit
def _write(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    num_slots,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_block,
    stride_head,
    stride_token,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """A program moves up to ELEMENTS values of a token's keys, and of its values."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token + tl.zeros([ELEMENTS], tl.int64))
    i = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    head = i // D
    d = i % D
    inside = (i < HEADS * D) & (slot >= 0) & (slot < num_slots)
    to = slot // BLOCK * stride_block + slot % BLOCK * stride_token + head * stride_head + d
    key = tl.load(k + token * stride_kt + head * stride_kh + d, mask=inside)
    value = tl.load(v + token * stride_vt + head * stride_vh + d, mask=inside)
    tl.store(k_cache + to, key.to(k_cache.dtype.element_ty), mask=inside)
    tl.store(v_cache + to, value.to(v_cache.dtype.element_ty), mask=inside)


@jit
def _copy(
    kv, src, dst, valid, num_blocks, HEADS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, ELEMENTS: tl.constexpr
):
    """A program copies one head of a pair of blocks in one layer, of K or of V: contiguous tokens."""
    pair = tl.program_id(0)
    plane = (tl.program_id(1) // HEADS).to(tl.int64) * num_blocks
    head = tl.program_id(1) % HEADS
    from_row = (plane + tl.load(src + pair)) * HEADS + head
    to_row = (plane + tl.load(dst + pair)) * HEADS + head
    end = tl.load(valid + pair).to(tl.int32) * D
    for start in range(0, BLOCK * D, ELEMENTS):
        i = start + tl.arange(0, ELEMENTS)
        moved = tl.load(kv + from_row * (BLOCK * D) + i, mask=i < end)
        tl.store(kv + to_row * (BLOCK * D) + i, moved, mask=i < end)


_library = torch.library.Library("axpo", "FRAGMENT")
_library.define(
    "triton_write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()"
)
_library.define("triton_copy_blocks(Tensor(a!) kv, Tensor src, Tensor dst, Tensor valid) -> ()")


def _write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    tokens, heads, dim = k.shape
    if k.numel() == 0:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    if k_cache.stride(-1) != 1 or k_cache.stride() != v_cache.stride():
        raise ValueError("write_kv: k_cache and v_cache must have equal strides, with the values of a row contiguous")
    constants = _write_tile(heads, dim, k_cache.shape[2], k.device)
    _write[(tokens, triton.cdiv(heads * dim, constants["ELEMENTS"]))](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping.contiguous(),
        k_cache.shape[0] * k_cache.shape[2],
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        **constants,
    )


def _copy_blocks(kv: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, valid: torch.Tensor) -> None:
    layers, two, num_blocks, heads, block_size, dim = kv.shape
    if kv.numel() == 0 or src.numel() == 0:
        return
    indices = (x.contiguous() for x in (src, dst, valid))
    grid = (len(src), layers * two * heads)
    _copy[grid](kv, *indices, num_blocks, **_copy_tile(heads, block_size, dim, kv.device))


def _write_tile(heads: int, dim: int, block_size: int, device: torch.device | str) -> dict[str, Any]:
    tile = tiles("kv_cache", device)
    elements = min(tile["write_elements"], triton.next_power_of_2(heads * dim))
    warps = max(1, elements // (32 * tile["per_thread"]))
    return {"HEADS": heads, "D": dim, "BLOCK": block_size, "ELEMENTS": elements, "num_warps": warps}


def _copy_tile(heads: int, block_size: int, dim: int, device: torch.device | str) -> dict[str, Any]:
    tile = tiles("kv_cache", device)
    elements = min(tile["copy_elements"], triton.next_power_of_2(block_size * dim))
    warps = max(1, elements // (32 * tile["per_thread"]))
    return {"HEADS": heads, "BLOCK": block_size, "D": dim, "ELEMENTS": elements, "num_warps": warps}


def aot_cases() -> list[AotCase]:
    """Eight KV heads of 128, in blocks of 16."""
    constants = _write_tile(8, 128, 16, "sm_90")
    warps = constants.pop("num_warps")
    pointers = dict.fromkeys(("k", "v", "k_cache", "v_cache"), "*bf16") | {"slots": "*i64"}
    strides = ["stride_kt", "stride_kh", "stride_vt", "stride_vh", "stride_block", "stride_head", "stride_token"]
    signature = pointers | {"num_slots": "i32"} | dict.fromkeys(strides, "i32") | constants
    write = AotCase("write_kv", _write, signature, num_warps=warps, aligned=(*pointers, *strides))
    constants = _copy_tile(8, 16, 128, "sm_90")
    warps = constants.pop("num_warps")
    pointers = {"kv": "*bf16"} | dict.fromkeys(("src", "dst", "valid"), "*i64")
    copy = AotCase("copy_blocks", _copy, pointers | {"num_blocks": "i32"} | constants, num_warps=warps, aligned=("kv",))
    return [write, copy]


def tune_candidates() -> list[dict[str, int]]:
    """Values of [sm_90.kv_cache] to measure."""
    return [
        {"write_elements": write, "copy_elements": copy, "per_thread": per_thread}
        for write in (512, 1024, 2048)
        for copy in (1024, 2048, 4096)
        for per_thread in (8, 16)
    ]


for _name, _run in (("triton_write_kv", _write_kv), ("triton_copy_blocks", _copy_blocks)):
    _library.impl(_name, _run, "CUDA")
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"axpo::{_name}", lambda *args: None, lib=_library)

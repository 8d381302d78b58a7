"""Paged attention in Triton: one kernel over the plan's work items, one that merges partial results; in tensor cores.

Both kernels are persistent: the number of items is read from device memory, so a captured CUDA graph serves a tree that
changes. Everything that a row's bits depend on is the same for each item: the shape of the products, the order of the
keys in a split, and the fold of the splits, which direct items and the merge share (and which is not fused, so that
the compiler cannot round the two differently).
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from kernels._triton import jit, tiles
from kernels.aot import AotCase
from kernels.paged_attention.plan import HEADER, ITEM, ROW, PagedPlan

_HEADER, _ROW, _ITEM = tl.constexpr(HEADER), tl.constexpr(ROW), tl.constexpr(ITEM)
_LOG2E, _LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


def paged_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    plan: PagedPlan,
    scale: float,
) -> torch.Tensor:
    """paged_attention of a plan that has a work list. q, k_cache, v_cache: bf16, fp16 or fp32, rows contiguous."""
    if plan.buffer is None or plan.tile is None:
        raise ValueError("paged_attention: this plan has no work list: make it with backend='triton'")
    fixed = plan.num_items is None
    items, merged, partials = (
        (plan.max_items, plan.max_rows, plan.max_partials)
        if fixed
        else (plan.num_items, plan.num_merged, plan.num_partials)
    )
    return torch.ops.axpo.triton_paged_attention(
        q,
        k_cache,
        v_cache,
        block_tables,
        plan.buffer,
        [plan.max_rows, items, merged, partials, plan.tile.rows, plan.tile.split, plan.tile.programs],
        scale,
    )


@jit
def _fold(top, weight, lse):
    """One more split: (top, weight) is the running log-sum-exp, keep and add the factors of the old and new outputs."""
    new = tl.maximum(top, lse)
    base = tl.where(new == float("-inf"), 0.0, new)
    keep = tl.exp2((top - base) * _LOG2E)
    add = tl.exp2((lse - base) * _LOG2E)
    return new, weight * keep + add, keep, add


# What changes from step to step is not specialised on: a new kernel would be compiled for it in the middle of a run.
@jit(fp_fusion=False, do_not_specialize=["max_rows", "stride_table"])
def _attend(
    q,
    k_cache,
    v_cache,
    out,
    partial_out,
    partial_lse,
    tables,
    plan,
    scale,
    max_rows,
    kv_heads,
    stride_table,
    stride_qt,
    stride_qh,
    stride_block,
    stride_head,
    stride_key,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    KEYS: tl.constexpr,
):
    """scale: times log2(e). out: [T, Hq, D], partial_out [P, Hq, D], partial_lse [P, Hq] (natural log), contiguous."""
    rows = plan + _HEADER
    items = rows + _ROW * max_rows
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    ahead = tl.arange(0, KEYS)
    inside = d < D
    q_heads = kv_heads * GROUP
    total = tl.load(plan) * kv_heads
    for work in range(tl.program_id(0), total, tl.num_programs(0)):
        item = items + work // kv_heads * _ITEM
        kv_head = work % kv_heads
        row_count = tl.load(item + 1)
        table = tables + tl.load(item + 2).to(tl.int64) * stride_table
        first_split = tl.load(item + 3)
        end_split = tl.load(item + 4)
        key_end = tl.load(item + 5)
        direct = tl.load(item + 6)
        x = tl.load(item) + row // GROUP
        live = row // GROUP < row_count
        head = kv_head * GROUP + row % GROUP
        position = tl.load(rows + max_rows + x, mask=live, other=-1)
        q_at = tl.load(rows + x, mask=live, other=0).to(tl.int64) * stride_qt + head * stride_qh
        query = tl.load(q + q_at[:, None] + d[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        k_head = k_cache + kv_head.to(tl.int64) * stride_head
        v_head = v_cache + kv_head.to(tl.int64) * stride_head

        output = tl.zeros([ROWS, BLOCK_D], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        for split in range(first_split, end_split):
            sums = tl.zeros([ROWS, BLOCK_D], tl.float32)
            peak = tl.full([ROWS], float("-inf"), tl.float32)
            mass = tl.zeros([ROWS], tl.float32)
            stop = tl.minimum((split + 1) * SPLIT, key_end)
            for key in range(split * SPLIT, stop, KEYS):  # pyright: ignore[reportArgumentType]
                # What lies behind the last key may be anything, NaN too: that key is read again, with no weight.
                at = tl.minimum(key + ahead, stop - 1)
                block = tl.load(table + at // BLOCK).to(tl.int64)
                cell = (block * stride_block + at % BLOCK * stride_key)[:, None] + d[None, :]
                if D == BLOCK_D:
                    keys = tl.load(k_head + cell)
                    values = tl.load(v_head + cell)
                else:
                    keys = tl.load(k_head + cell, mask=inside[None, :], other=0.0)
                    values = tl.load(v_head + cell, mask=inside[None, :], other=0.0)
                scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
                scores = tl.where(key + ahead[None, :] <= position[:, None], scores, float("-inf"))
                new = tl.maximum(peak, tl.max(scores, 1))
                base = tl.where(new == float("-inf"), 0.0, new)
                keep = tl.exp2(peak - base)
                weights = tl.exp2(scores - base[:, None])
                mass = mass * keep + tl.sum(weights, 1)
                sums = tl.dot(weights.to(values.dtype), values, sums * keep[:, None], input_precision="ieee")
                peak = new
            some = mass > 0
            mass = tl.where(some, mass, 1.0)
            lse = tl.where(some, (peak + tl.log2(mass)) * _LN2, float("-inf"))
            top, weight, keep, add = _fold(top, weight, lse)
            output = output * keep[:, None] + sums * (1.0 / mass)[:, None] * add[:, None]

        # Read anew, which `volatile` enforces: held since before the loop, these would be spilled.
        x = tl.load(item, volatile=True) + row // GROUP
        live = row // GROUP < tl.load(item + 1, volatile=True)
        head = kv_head * GROUP + row % GROUP
        wanted = live[:, None] & inside[None, :]
        if direct:
            token = tl.load(rows + x, mask=live, other=0).to(tl.int64)
            result = output * (1.0 / tl.where(live, weight, 1.0))[:, None]
            cell = (token * q_heads + head)[:, None] * D + d[None, :]
            tl.store(out + cell, result.to(out.dtype.element_ty), wanted)
        else:  # of one split, so weight is 1; a row that ends before the split begins has no place for it
            left = live & (tl.load(rows + max_rows + x, mask=live, other=-1) >= first_split * SPLIT)
            slot = tl.load(rows + 2 * max_rows + x, mask=live, other=0).to(tl.int64) + first_split
            slot = slot * q_heads + head
            tl.store(partial_out + slot[:, None] * D + d[None, :], output, left[:, None] & inside[None, :])
            tl.store(partial_lse + slot, top, left)


@jit(fp_fusion=False, do_not_specialize=["max_rows"])
def _merge(
    out,
    partial_out,
    partial_lse,
    plan,
    max_rows,
    q_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A program merges the partials of one row and head, in the order of the splits."""
    rows = plan + _HEADER
    d = tl.arange(0, BLOCK_D)
    total = tl.load(plan + 1) * q_heads
    for work in range(tl.program_id(0), total, tl.num_programs(0)):
        x = work // q_heads
        head = work % q_heads
        token = tl.load(rows + x).to(tl.int64)
        count = tl.load(rows + max_rows + x) // SPLIT + 1
        first = tl.load(rows + 2 * max_rows + x).to(tl.int64) * q_heads + head
        limit = tl.where(d < D, count, 0)
        output = tl.zeros([BLOCK_D], tl.float32)
        top = tl.full([], float("-inf"), tl.float32)
        weight = tl.full([], 0.0, tl.float32)
        for start in range(0, count, UNROLL):
            # Independent loads, all on their way before the first is folded.
            for i in tl.static_range(UNROLL):  # pyright: ignore[reportGeneralTypeIssues]
                slot = first + (start + i) * q_heads
                lse = tl.load(partial_lse + slot, mask=start + i < count, other=float("-inf"))
                part = tl.load(partial_out + slot * D + d, mask=start + i < limit, other=0.0)
                top, weight, keep, add = _fold(top, weight, lse)
                output = output * keep + part * add
        tl.store(out + (token * q_heads + head) * D + d, (output * (1.0 / weight)).to(out.dtype.element_ty), d < D)


_library = torch.library.Library("axpo", "FRAGMENT")
_library.define(
    "triton_paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor plan, int[] sizes, "
    "float scale) -> Tensor"
)


def _launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    plan: torch.Tensor,
    sizes: list[int],
    scale: float,
) -> torch.Tensor:
    max_rows, items, merged, partials, tile_rows, split, programs = sizes
    q, k_cache, v_cache, block_tables = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_cache, v_cache, block_tables)
    )
    q_heads, dim = q.shape[1:]
    kv_heads, block_size = k_cache.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    tile = tiles("paged_attention", q.device)
    partial_out = torch.empty(partials, q_heads, dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(partials, q_heads, dtype=torch.float32, device=q.device)
    _attend[(min(programs, items * kv_heads),)](
        q,
        k_cache,
        v_cache,
        out,
        partial_out,
        partial_lse,
        block_tables,
        plan,
        scale * _LOG2E.value,
        max_rows,
        kv_heads,
        block_tables.stride(0),
        *q.stride()[:2],
        *k_cache.stride()[:3],
        **_attend_tile(tile, q_heads // kv_heads, dim, block_size, tile_rows, split, q.element_size()),
    )
    if merged:
        _merge[(min(8 * programs, merged * q_heads),)](
            out, partial_out, partial_lse, plan, max_rows, q_heads, **_merge_tile(tile, dim, split)
        )
    return out


def _attend_tile(
    tile: Mapping[str, Any], group: int, dim: int, block_size: int, rows: int, split: int, itemsize: int
) -> dict[str, Any]:
    """Constants and options of _attend. Twice the bytes a key, or twice the width, take half the stages or warps."""
    width = max(16, triton.next_power_of_2(dim))
    return {
        "GROUP": group,
        "D": dim,
        "BLOCK_D": width,
        "BLOCK": block_size,
        "ROWS": rows,
        "SPLIT": split,
        "KEYS": min(tile["keys"], split),
        "num_warps": tile["warps"] if width <= 128 else 2 * tile["warps"],
        "num_stages": tile["stages"] if width * itemsize <= 256 else 2,
    }


def _merge_tile(tile: Mapping[str, Any], dim: int, split: int) -> dict[str, Any]:
    width = max(16, triton.next_power_of_2(dim))
    return {
        "D": dim,
        "BLOCK_D": width,
        "SPLIT": split,
        "UNROLL": tile["merge_unroll"],
        "num_warps": tile["merge_warps"],
    }


def aot_cases() -> list[AotCase]:
    """Qwen3-VL 8B's heads (32 query, 8 KV, D 128) and the mini model's, in blocks of 16."""
    tile = tiles("paged_attention", "sm_90")
    every = []
    for name, group, dim in (("8b", 4, 128), ("mini", 2, 32)):
        constants = _attend_tile(tile, group, dim, 16, tile["rows"], tile["split"], 2)
        options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
        strides = ["stride_qt", "stride_qh", "stride_block", "stride_head", "stride_key"]
        pointers = dict.fromkeys(("q", "k_cache", "v_cache", "out"), "*bf16")
        pointers |= dict.fromkeys(("partial_out", "partial_lse"), "*fp32") | dict.fromkeys(("tables", "plan"), "*i32")
        numbers = {"scale": "fp32"} | dict.fromkeys(("max_rows", "kv_heads", "stride_table", *strides), "i32")
        aligned = (*pointers, *strides)
        every.append(
            AotCase(
                f"paged_attention.{name}",
                _attend,
                pointers | numbers | constants,
                **options,
                aligned=aligned,
                wgmma=True,
            )
        )
        constants = _merge_tile(tile, dim, tile["split"])
        warps = constants.pop("num_warps")
        pointers = {"out": "*bf16", "partial_out": "*fp32", "partial_lse": "*fp32", "plan": "*i32"}
        signature = pointers | {"max_rows": "i32", "q_heads": "i32"} | constants
        every.append(
            AotCase(f"paged_attention.merge.{name}", _merge, signature, num_warps=warps, aligned=tuple(pointers))
        )
    return every


def tune_candidates() -> list[dict[str, int]]:
    """Values of [sm_90.paged_attention] to measure. Rows stay at 64, the one shape of a warp group's product."""
    return [
        {"split": split, "keys": keys, "stages": stages, "programs": programs, "warps": warps}
        for split in (256, 512, 1024)
        for keys in (64, 128)
        for stages, programs in ((2, 2), (3, 2), (4, 1), (2, 3))
        for warps in (4,)
    ]


def _fake(q, k_cache, v_cache, block_tables, plan, sizes, scale):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


_library.impl("triton_paged_attention", _launch, "CUDA")
_library.impl("triton_paged_attention", _launch, "CPU")
torch.library.register_fake("axpo::triton_paged_attention", _fake, lib=_library)

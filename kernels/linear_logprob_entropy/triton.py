"""linear_logprob_entropy in Triton: launches and registration; the kernels are in kernel_forward and kernel_backward.

Forward: tiles of logits are reduced in registers to a partial state for each row and split of the vocabulary, and a
second kernel merges a row's partials. Backward: for each chunk of the vocabulary, one kernel recomputes the logits and
writes their gradient in the inputs' dtype, from which two matrix products make the parts of hidden's gradient
(accumulated in fp32) and of weight's (written once).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels._triton import tiles
from kernels.aot import AotCase
from kernels.linear_logprob_entropy.chunked import backward_fake, forward_fake, gradients, setup_context
from kernels.linear_logprob_entropy.kernel_backward import dlogits_kernel
from kernels.linear_logprob_entropy.kernel_forward import merge_kernel, rows_kernel, tiles_kernel

# What a chunk of fp32 logits ("matmul" forward) or of their gradient (backward) may take.
CHUNK_BYTES = 256 << 20
MERGE_ROWS, MERGE_SPLITS = 8, 128
# fp32 products run outside the tensor cores, to keep their digits, and need far more registers.
FP32_TILE = {"block_m": 64, "block_n": 64, "tma": False, "num_warps": 4, "num_stages": 2}


@torch.library.custom_op("axpo::triton_linear_logprob_entropy", mutates_args=())
def fused(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob, entropy, largest logit before the temperature, log Σ e^{z−max}), each [N] fp32."""
    labels = labels.contiguous()
    partial, at_label = partials(hidden, weight, labels, temperature, 0)
    logprob, entropy, maximum, log_sum = (temperature.new_empty(len(hidden)) for _ in range(4))
    out = {"logprob": logprob, "entropy": entropy, "maximum": maximum, "log_sum": log_sum}
    merge(partial, temperature, labels=labels, at_label=at_label, ignore_index=ignore_index, **out)
    return logprob, entropy, maximum, log_sum


@torch.library.custom_op("axpo::triton_linear_logprob_state", mutates_args=())
def state(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor, vocab_start: int
) -> torch.Tensor:
    """linear_logprob_state, [N, 4] fp64."""
    labels = labels.contiguous()
    partial, at_label = partials(hidden, weight, labels, temperature, vocab_start)
    out = temperature.new_empty((len(hidden), 4), dtype=torch.float64)
    merge(partial, temperature, labels=labels, at_label=at_label, state=out)
    return out


@torch.library.custom_op("axpo::triton_linear_logprob_entropy_backward", mutates_args=())
def backward(
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: torch.Tensor,
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    maximum: torch.Tensor,
    log_sum: torch.Tensor,
    vocab_start: int,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden and weight; one that is not needed is returned empty. See chunked.backward."""
    hidden, weight, labels = dense(hidden), dense(weight), labels.contiguous()
    (n, h), v = hidden.shape, weight.shape[0]
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=torch.float32)
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,))
    if n == 0 or v == 0:
        return grad_hidden.to(hidden.dtype), grad_weight.zero_()
    tile = tile_of("linear_logprob_entropy_backward", hidden)
    per_row = [x.contiguous() for x in (logprob, entropy, maximum, log_sum, grad_logprob, grad_entropy)]
    width = chunk_columns(n * hidden.element_size(), tile["block_n"], v)
    memory = hidden.new_empty(n * width)
    x, options = operand(hidden, weight, tile, "m")
    with exact_reductions(hidden):
        for first in range(0, v, width):
            columns = weight[first : first + width]
            c = len(columns)
            dlogits = memory[: n * c].view(n, c)
            grid = (triton.cdiv(n, tile["block_m"]) * triton.cdiv(c, tile["block_n"]),)
            dlogits_kernel[grid](
                x,
                operand(columns, hidden, tile, "n")[0],
                temperature,
                labels,
                *per_row,
                dlogits,
                n,
                c,
                h,
                hidden.stride(0),
                weight.stride(0),
                vocab_start + first,
                ignore_index,
                **options,
            )
            if need_hidden:
                add_product(grad_hidden, dlogits, columns)
            if need_weight:
                product(dlogits.T, hidden, grad_weight[first : first + width])
    return grad_hidden.to(hidden.dtype), grad_weight


def partials(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor, vocab_start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(partial [3, splits, N], at_label [N]) of tiles_kernel, by the form that tiles.toml names."""
    hidden, weight = dense(hidden), dense(weight)
    (n, h), v = hidden.shape, weight.shape[0]
    tile = tile_of("linear_logprob_entropy", hidden)
    span = tile["tiles_per_split"] * tile["block_n"]
    splits = triton.cdiv(v, span)
    partial = temperature.new_empty((3, splits, n))
    at_label = torch.full_like(temperature, -torch.inf)
    if n == 0 or v == 0:
        return partial, at_label
    if tile["forward"] == "matmul":
        width = chunk_columns(4 * n, span, v)
        memory = temperature.new_empty(n * width)
        with exact_reductions(hidden):
            for first in range(0, v, width):
                columns = weight[first : first + width]
                logits = product(hidden, columns.T, memory[: n * len(columns)].view(n, len(columns)))
                here = triton.cdiv(len(columns), span)
                where = (n, v, logits.stride(0), first, first // span, splits, vocab_start, span)
                block = triton.next_power_of_2(span)
                rows_kernel[(n, here)](logits, temperature, labels, at_label, partial, *where, BLOCK=block)
        return partial, at_label
    x, options = operand(hidden, weight, tile, "m")
    w, _ = operand(weight, hidden, tile, "n")
    unused = (None, None, None, None)
    shape = (n, v, h, hidden.stride(0), weight.stride(0), vocab_start, splits)
    tiles_kernel[(triton.cdiv(n, tile["block_m"]) * splits,)](
        x,
        w,
        temperature,
        labels,
        at_label,
        partial,
        *unused,
        *shape,
        TILES=tile["tiles_per_split"],
        SAMPLE=False,
        BANNED=False,
        **options,
    )
    return partial, at_label


def merge(partial: torch.Tensor, temperature: torch.Tensor, ignore_index: int = 0, **tensors: torch.Tensor) -> None:
    """merge_kernel with the tensors it is to read and write; those not named are not touched."""
    _, splits, n = partial.shape
    if n == 0:
        return
    names = ("labels", "at_label", "best_token", "logprob", "entropy", "maximum", "log_sum", "state", "tokens")
    merge_kernel[(triton.cdiv(n, MERGE_ROWS),)](
        partial,
        temperature,
        *(tensors.get(name) for name in names),
        n,
        splits,
        ignore_index,
        SAMPLE="tokens" in tensors,
        STATE="state" in tensors,
        BLOCK_M=MERGE_ROWS,
        BLOCK_S=MERGE_SPLITS,
    )


def tile_of(op: str, x: torch.Tensor) -> Mapping[str, Any]:
    """tiles.toml's sizes for x's device, and FP32_TILE's in their place for fp32 on a GPU."""
    tile = tiles(op, x.device)
    return {**tile, **FP32_TILE} if x.is_cuda and x.element_size() == 4 else tile


def dense(x: torch.Tensor) -> torch.Tensor:
    """x with unit stride along its rows, which may lie apart."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def chunk_columns(bytes_of_column: int, multiple: int, vocabulary: int) -> int:
    """Columns of a chunk within CHUNK_BYTES, a multiple of the tile (at least one)."""
    return min(max(CHUNK_BYTES // bytes_of_column // multiple, 1) * multiple, vocabulary)


def operand(
    x: torch.Tensor, other: torch.Tensor, tile: Mapping[str, Any], rows: str
) -> tuple[torch.Tensor | TensorDescriptor, dict[str, Any]]:
    """A matrix as the kernels take it (a descriptor for the TMA unit where both allow one), and the tile's options.

    rows: which side of the tile its rows are, "m" or "n". block_k is in elements of two bytes.
    """
    size = x.element_size()
    k = tile["block_k"] * 2 // size
    tma = tile["tma"] and all(y.data_ptr() % 16 == 0 and y.stride(0) * size % 16 == 0 for y in (x, other))
    options = {
        "GROUP": tile["group"],
        "BLOCK_M": tile["block_m"],
        "BLOCK_N": tile["block_n"],
        "BLOCK_K": k,
        "TMA": tma,
        "num_warps": tile["num_warps"],
        "num_stages": tile["num_stages"],
    }
    if not tma:
        return x, options
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [tile[f"block_{rows}"], k]), options


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = a @ b, summed in fp32 and rounded once to out's dtype."""
    if a.is_cuda:
        return torch.mm(a, b, out=out) if out.dtype == a.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a.float() @ b.float())


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out += a @ b for fp32 out."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.float(), b.float())


@contextmanager
def exact_reductions(x: torch.Tensor) -> Iterator[None]:
    """Keeps cuBLAS from adding up parts of a sum in the operands' own half precision."""
    if not x.is_cuda:
        yield
        return
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction, flags.allow_fp16_reduced_precision_reduction
    flags.allow_bf16_reduced_precision_reduction = flags.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        flags.allow_bf16_reduced_precision_reduction, flags.allow_fp16_reduced_precision_reduction = before


fused.register_fake(forward_fake)
fused.register_autograd(gradients(backward), setup_context=setup_context)
backward.register_fake(backward_fake)


@state.register_fake
def _(hidden, weight, labels, temperature, vocab_start):
    return hidden.new_empty((hidden.shape[0], 4), dtype=torch.float64)


def aot_cases() -> list[AotCase]:
    """The kernels at the H100's tiles, for Qwen3's head in bf16."""
    tile = tiles("linear_logprob_entropy", "sm_90")
    options, constants = aot_options(tile)
    rows = {"temperature": "*fp32", "labels": "*i64", "at_label": "*fp32"}
    sizes = dict.fromkeys(("N", "V", "H", "stride_x", "stride_w", "vocab_start", "splits"), "i32")
    unused = dict.fromkeys(("seeds", "positions", "banned", "best_token"))
    forward = {
        **aot_matrices(tile),
        **rows,
        "partial": "*fp32",
        **unused,
        **sizes,
        "TILES": tile["tiles_per_split"],
        "SAMPLE": False,
        "BANNED": False,
    }
    merged = dict.fromkeys(("logprob", "entropy", "maximum", "log_sum"), "*fp32")
    merging = {
        "partial": "*fp32",
        **rows,
        "best_token": None,
        **merged,
        "state": None,
        "tokens": None,
        "N": "i32",
        "splits": "i32",
        "ignore_index": "i32",
        "SAMPLE": False,
        "STATE": False,
        "BLOCK_M": MERGE_ROWS,
        "BLOCK_S": MERGE_SPLITS,
    }
    span = tile["tiles_per_split"] * tile["block_n"]
    by_row = {
        "logits": "*fp32",
        **rows,
        "partial": "*fp32",
        **dict.fromkeys(
            ("N", "V", "stride", "first", "first_split", "splits", "vocab_start", "columns_of_split"), "i32"
        ),
        "BLOCK": triton.next_power_of_2(span),
    }
    back = tiles("linear_logprob_entropy_backward", "sm_90")
    back_options, back_constants = aot_options(back)
    statistics = ("logprob", "entropy", "maximum", "log_sum", "grad_logprob", "grad_entropy")
    backward = {
        **aot_matrices(back),
        "temperature": "*fp32",
        "labels": "*i64",
        **dict.fromkeys(statistics, "*fp32"),
        "out": "*bf16",
        **dict.fromkeys(("N", "C", "H", "stride_x", "stride_w", "first", "ignore_index"), "i32"),
    }
    name = "linear_logprob_entropy"
    strides = ("H", "stride_x", "stride_w")
    return [
        AotCase(f"{name}.tiles", tiles_kernel, forward | constants, aligned=strides, wgmma=True, **options),
        AotCase(f"{name}.rows", rows_kernel, by_row, aligned=("logits", "stride", "first")),
        AotCase(f"{name}.merge", merge_kernel, merging, aligned=("partial",)),
        AotCase(
            f"{name}.dlogits",
            dlogits_kernel,
            backward | back_constants,
            aligned=("C", *strides),
            wgmma=True,
            **back_options,
        ),
    ]


def aot_matrices(tile: Mapping[str, Any]) -> dict[str, str]:
    return {x: f"tensordesc<bf16[{tile[f'block_{side}']},{tile['block_k']}]>" for x, side in (("x", "m"), ("w", "n"))}


def aot_options(tile: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(num_warps and num_stages, the constexprs) of operand's options on a GPU."""
    blocks = {name: tile[name.lower()] for name in ("GROUP", "BLOCK_M", "BLOCK_N", "BLOCK_K")}
    return {key: tile[key] for key in ("num_warps", "num_stages")}, blocks | {"TMA": True}


def tune_candidates() -> dict[str, list[dict[str, Any]]]:
    """What bench/tune.py lays over each section of tiles.toml."""
    shapes = [{"block_m": m, "block_n": n, "num_warps": w} for m, n, w in ((128, 256, 8), (256, 128, 8), (128, 128, 8))]
    common = [*shapes, {"num_stages": 3}, {"num_stages": 4}, {"tma": False}, {"group": 8}, {"group": 32}]
    splits = [{"tiles_per_split": count} for count in (1, 2, 4, 8)]
    return {
        "linear_logprob_entropy": [*common, *splits, {"forward": "matmul", "tiles_per_split": 16}],
        "linear_logprob_entropy_backward": common,
    }

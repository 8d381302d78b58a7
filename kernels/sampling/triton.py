"""sample and linear_sample in Triton.

sample is three launches for any batch: one program a row finds where top-k and top-p cut, then one program a row and
part of the vocabulary adds the noise and reduces its part, then the parts of a row are merged. linear_sample is
the last two, with the logits made in the first of them by the LM head's own kernel.
"""

from typing import Any

import torch
import triton

from kernels._triton import tiles
from kernels.aot import AotCase
from kernels.linear_logprob_entropy.kernel_forward import tiles_kernel
from kernels.linear_logprob_entropy.triton import aot_matrices, aot_options, dense, merge, operand, tile_of
from kernels.sampling.kernels import cut_kernel, draw_kernel


@torch.library.custom_op("axpo::triton_sample", mutates_args=())
def sample(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    banned: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token, logprob, entropy), each [B]."""
    logits = dense(logits)
    n, v = logits.shape
    per_row = [x.contiguous() for x in (seeds, positions, temperature)]
    mask = mask_of(banned, v, logits.device)
    tile = tiles("sample", logits.device)
    splits = triton.cdiv(v, tile["block"])
    partial = logits.new_empty((5, splits, n))
    best_token = logits.new_empty((splits, n), dtype=torch.int32)
    cut, last, top = logits.new_empty(n), logits.new_empty(n, dtype=torch.int32), logits.new_empty(n)
    if n:
        least = None if min_p is None else min_p.contiguous()
        cut_kernel[(n,)](
            logits,
            per_row[2],
            top_k.contiguous(),
            top_p.contiguous(),
            least,
            mask,
            cut,
            last,
            top,
            v,
            logits.stride(0),
            MIN_P=least is not None,
            BANNED=mask is not None,
            BLOCK=tile["cut_block"],
            num_warps=tile["cut_warps"],
        )
        draw_kernel[(n, splits)](
            logits,
            *per_row,
            least,
            mask,
            cut,
            last,
            top,
            partial,
            best_token,
            n,
            v,
            logits.stride(0),
            splits,
            MIN_P=least is not None,
            BANNED=mask is not None,
            BLOCK=tile["block"],
            num_warps=tile["num_warps"],
        )
    return _merged(partial, best_token, per_row[2])


@torch.library.custom_op("axpo::triton_linear_sample", mutates_args=())
def linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    banned: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token, logprob, entropy), each [B]."""
    hidden, weight = dense(hidden), dense(weight)
    (n, h), v = hidden.shape, weight.shape[0]
    seeds, positions, temperature = (x.contiguous() for x in (seeds, positions, temperature))
    mask = mask_of(banned, v, hidden.device)
    tile = tile_of("linear_sample", hidden)
    splits = triton.cdiv(v, tile["tiles_per_split"] * tile["block_n"])
    partial = temperature.new_empty((5, splits, n))
    best_token = temperature.new_empty((splits, n), dtype=torch.int32)
    if n:
        x, options = operand(hidden, weight, tile, "m")
        w, _ = operand(weight, hidden, tile, "n")
        unused = (None, None)
        shape = (n, v, h, hidden.stride(0), weight.stride(0), 0, splits)
        tiles_kernel[(triton.cdiv(n, tile["block_m"]) * splits,)](
            x,
            w,
            temperature,
            *unused,
            partial,
            seeds,
            positions,
            mask,
            best_token,
            *shape,
            TILES=tile["tiles_per_split"],
            SAMPLE=True,
            BANNED=mask is not None,
            **options,
        )
    return _merged(partial, best_token, temperature)


def mask_of(banned: torch.Tensor | None, vocabulary: int, device: torch.device) -> torch.Tensor | None:
    """[V] int8 with 1 where a token is banned."""
    if banned is None:
        return None
    return torch.zeros(vocabulary, dtype=torch.int8, device=device).index_fill_(0, banned, 1)


def _merged(
    partial: torch.Tensor, best_token: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = partial.shape[2]
    tokens = best_token.new_empty(n, dtype=torch.int64)
    logprob, entropy = partial.new_empty(n), partial.new_empty(n)
    merge(partial, temperature, best_token=best_token, tokens=tokens, logprob=logprob, entropy=entropy)
    return tokens, logprob, entropy


@sample.register_fake
def _(logits, seeds, positions, temperature, top_k, top_p, banned=None, min_p=None):
    return torch.empty_like(seeds), logits.new_empty(logits.shape[:1]), logits.new_empty(logits.shape[:1])


@linear_sample.register_fake
def _(hidden, weight, seeds, positions, temperature, banned=None):
    return torch.empty_like(seeds), torch.empty_like(temperature), torch.empty_like(temperature)


def aot_cases() -> list[AotCase]:
    """The kernels at the H100's tiles, for Qwen3's vocabulary."""
    tile = tiles("sample", "sm_90")
    cuts = {"cut": "*fp32", "last": "*i32", "top": "*fp32"}
    draws = {"seeds": "*i64", "positions": "*i64", "temperature": "*fp32"}
    filters = {"min_p": "*fp32", "banned": "*i8"}
    parts = {"partial": "*fp32", "best_token": "*i32"}
    flags = {"MIN_P": True, "BANNED": True}
    cutting = {
        "logits": "*fp32",
        "temperature": "*fp32",
        "top_k": "*i64",
        "top_p": "*fp32",
        **filters,
        **cuts,
        "V": "i32",
        "stride": "i32",
        **flags,
        "BLOCK": tile["cut_block"],
    }
    drawing = {
        "logits": "*fp32",
        **draws,
        **filters,
        **cuts,
        **parts,
        "N": "i32",
        "V": "i32",
        "stride": "i32",
        "splits": "i32",
        **flags,
        "BLOCK": tile["block"],
    }
    head = tiles("linear_sample", "sm_90")
    options, blocks = aot_options(head)
    sizes = dict.fromkeys(("N", "V", "H", "stride_x", "stride_w", "vocab_start", "splits"), "i32")
    heading = {
        **aot_matrices(head),
        "temperature": "*fp32",
        "labels": None,
        "at_label": None,
        "partial": "*fp32",
        "seeds": "*i64",
        "positions": "*i64",
        "banned": "*i8",
        "best_token": "*i32",
        **sizes,
        "TILES": head["tiles_per_split"],
        "SAMPLE": True,
        "BANNED": True,
        **blocks,
    }
    aligned = ("logits", "V", "stride")
    return [
        AotCase("sample.cut", cut_kernel, cutting, num_warps=tile["cut_warps"], aligned=aligned),
        AotCase("sample.draw", draw_kernel, drawing, num_warps=tile["num_warps"], aligned=aligned),
        AotCase(
            "linear_sample.tiles",
            tiles_kernel,
            heading,
            aligned=("H", "stride_x", "stride_w"),
            wgmma=True,
            **options,
        ),
    ]


def tune_candidates() -> dict[str, list[dict[str, Any]]]:
    """What bench/tune.py lays over each section of tiles.toml."""
    shapes = ((64, 128, 128, 8), (64, 64, 128, 4), (64, 256, 64, 8), (128, 128, 64, 8))
    head = [{"block_m": m, "block_n": n, "block_k": k, "num_warps": w} for m, n, k, w in shapes]
    return {
        "sample": [
            *({"block": block, "num_warps": warps} for block in (2048, 4096, 8192) for warps in (4, 8, 16)),
            *({"cut_block": block, "cut_warps": warps} for block in (2048, 4096, 8192) for warps in (8, 16, 32)),
        ],
        "linear_sample": [*head, {"num_stages": 3}, {"tma": False}, {"tiles_per_split": 2}],
    }

"""Whole steps of a small model in one call to C++, for inference on the CPU: all layers, the vision tower.

A thread takes a share of the sequences (or images) through all layers by itself, with its own matrix products over
weights packed for them. There is no barrier between operators, and a row's result does not depend on the batch, on what
is shared, or on the threads.
"""

import torch
import torch.nn.functional as F

from kernels._library import LOADED, MODE, use_cpp

PANEL = 32  # columns of a packed weight that lie together


def can_pack(kv: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether `packed_forward` serves a model with these weights over this cache, [L, 2, blocks, Hk, block_size, D]."""
    sizes = [size for weight in weights for size in weight.shape]
    block_size, dim = kv.shape[4:]
    fits = dim % 16 == 0 and dim <= 256 and block_size % 16 == 0 and all(size % 16 == 0 for size in sizes)
    return fits and can_pack_tensors(kv, *weights)


def can_pack_tensors(*tensors: torch.Tensor) -> bool:
    """Whether the C++ is there and takes tensors of this dtype and device."""
    return MODE in ("auto", "cpp") and use_cpp(*tensors)


def pack_panels(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [ceil(N / 32), K, 32], padded with zeros: how products read a weight."""
    padded = F.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    return padded.view(-1, PANEL, weight.shape[1]).transpose(1, 2).contiguous()


def pack_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Two [I, H] -> [I / 16, H, 32]: each panel holds 16 gates, then their 16 ups."""
    half = PANEL // 2
    both = torch.cat([weight.view(-1, half, weight.shape[1]) for weight in (gate, up)], dim=1)
    return both.transpose(1, 2).contiguous()


def pack_bias(bias: torch.Tensor) -> torch.Tensor:
    """[N] padded with zeros to whole panels."""
    return F.pad(bias, (0, -len(bias) % PANEL))


def packed_forward(
    tokens: torch.Tensor,
    positions: torch.Tensor,
    embedding: torch.Tensor,
    weights: list[torch.Tensor],
    norm: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    kv: torch.Tensor,
    slots: torch.Tensor,
    writes: torch.Tensor | None,
    tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    wanted: torch.Tensor,
    image_rows: torch.Tensor | None,
    features: list[torch.Tensor],
    eps: float,
    scale: float,
) -> torch.Tensor:
    """Hidden states behind the final norm, [n, H], of the `wanted` rows of a step, ascending.

    tokens: [T]; positions: [3, T] int64; embedding: [V, H]; weights: nine a layer: input norm [H], q, k and v (packed),
    q norm [D], k norm [D], o (packed), post-attention norm [H], gate and up (pack_gate_up), down (packed), where k and
    v are one weight; norm: [H]; angles: axis [D/2] int64, which of the three positions turns a pair, and cos, sin
    [P, D/2] of every position. kv: [L, 2, blocks, Hk, block_size, D], written to, where a block's keys are kept
    transposed, [Hk, D, block_size]: it must be copied as a whole. slots, writes, tables, cu_seqlens,
    context_lens as in `write_kv` and `paged_attention`. features: [m, H] each: the first replaces the embeddings of the
    rows `image_rows` (ascending), the others are added to them behind the first layers.
    fp32 on the CPU; there is no gradient. Raises ValueError or IndexError for what does not fit.
    """
    return torch.ops.axpo.packed_forward.default(
        tokens,
        positions,
        embedding,
        weights,
        norm,
        *angles,
        kv,
        slots,
        writes,
        tables,
        cu_seqlens,
        context_lens,
        wanted,
        image_rows,
        features,
        eps,
        scale,
    )


def packed_decode(
    embedding: torch.Tensor,
    weights: list[torch.Tensor],
    norm: torch.Tensor,
    head: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    kv: torch.Tensor,
    rows: torch.Tensor,
    temperature: torch.Tensor,
    tables: torch.Tensor,
    stops: torch.Tensor,
    banned: torch.Tensor,
    eps: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decodes n sequences for several tokens each: what as many calls of `packed_forward` and `linear_sample` give.

    embedding, weights, norm, angles, kv, eps, scale: of `packed_forward`; head: the LM head [V, H], packed.
    rows: [5, n] int64: of each sequence the token to compute first, its index (and number of tokens with KV), what is
    to be added to an index to get its rotary position, the seed of its noise, and how many tokens it wants; temperature
    [n] fp32, 0 = greedy; tables [n, columns] int32: blocks of its own for all that it will write; stops [n, m] int64:
    tokens that end it, padded with -1; banned: ids that are never sampled. Returns tokens int64, logprobs and entropies
    fp32, all [n, most], and how many of them there are, [n] int64: a sequence ends behind the first of its stops.
    fp32 on the CPU. Raises ValueError or IndexError for what does not fit.
    """
    return torch.ops.axpo.packed_decode.default(
        embedding, weights, norm, head, *angles, kv, rows, temperature, tables, stops, banned, eps, scale
    )


def packed_vision(
    pixels: torch.Tensor,
    lengths: torch.Tensor,
    tables: list[torch.Tensor],
    weights: list[torch.Tensor],
    levels: list[int],
    blocks: int,
    heads: int,
    unit: int,
    width: int,
    eps: float,
) -> torch.Tensor:
    """Qwen3-VL's vision tower over frames of `lengths` [F] patches: [1 + levels, tokens, width], the embeddings first.

    pixels: [P, patch_dim]; tables: of each frame learned positions [p, H], cos and sin [p, H / heads / 2]; weights,
    where a linear is its packed weight and its padded bias and a norm its weight and bias: patch embedding; of each
    block norm, qkv, projection, norm, fc1, fc2; of the merger, then of DeepStack's, norm, fc1, fc2. levels: blocks that
    DeepStack reads behind, ascending; unit: patches of a token. H and the inner sizes are multiples of 32. fp32 on the
    CPU; there is no gradient.
    """
    return torch.ops.axpo.packed_vision.default(
        pixels, lengths, tables, weights, levels, blocks, heads, unit, width, eps
    )


if LOADED:

    @torch.library.register_fake("axpo::packed_vision")
    def _(pixels, lengths, tables, weights, levels, blocks, heads, unit, width, eps):
        return pixels.new_empty(len(levels) + 1, len(pixels) // unit, width)

    @torch.library.register_fake("axpo::packed_forward")
    def _(
        tokens, positions, embedding, weights, norm, axis, cos, sin, kv, slots, writes, tables, starts, lens, wanted, *_
    ):
        return embedding.new_empty(len(wanted), embedding.shape[1])

    @torch.library.register_fake("axpo::packed_decode")
    def _(embedding, weights, norm, head, axis, cos, sin, kv, rows, temperature, *_):
        n, most = rows.shape[1], torch.library.get_ctx().new_dynamic_size()  # as many as the row that wants most
        logprobs, entropies = (temperature.new_empty(n, most) for _ in range(2))
        return rows.new_empty(n, most), logprobs, entropies, rows.new_empty(n)

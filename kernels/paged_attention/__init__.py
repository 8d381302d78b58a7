"""Attention of packed queries over a paged KV cache: prefill, extend and decode in one call."""

import numpy as np
import torch

from kernels._library import FP32_BF16, LOADED, MODE, TRITON, choose
from kernels.paged_attention.plan import PagedPlan, PagedTile, PlanOverflow, build, fixed_plan, upload
from kernels.paged_attention.reference import paged_attention_reference

__all__ = [
    "PagedPlan",
    "PagedTile",
    "PlanOverflow",
    "fixed_paged_plan",
    "paged_attention",
    "paged_attention_reference",
    "paged_plan",
    "why_not_compiled",
]


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    plan: PagedPlan | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence's last tokens over all of its tokens. Returns [T, Hq, D] in the dtype of q.

    q: [T, Hq, D]. k_cache, v_cache: [num_blocks, Hk, block_size, D], Hq a multiple of Hk (query head h reads KV head
    h * Hk // Hq); the queries' own keys and values are already written. block_tables: [S, max_blocks] int32.
    Sequence s owns query rows cu_seqlens_q[s]:cu_seqlens_q[s + 1] ([S + 1] int32, from 0 to T), the last of which is
    at absolute position context_lens[s] - 1 ([S] int32); a query at position p sees positions 0..p.
    scale: factor on the scores before the softmax.
    plan: of `paged_plan`, for the same tables, lengths and device; one serves every layer of a step. Without one it is
    made here, which on CUDA waits for the device.
    backend: "triton" (q, k_cache and v_cache of one dtype of at most 32 bits, caches of equal strides, Hq / Hk at most
    64, D at most 256), "cpp" (fp32 or bf16 throughout, D and block_size multiples of 8, D at most 256) or "reference";
    default: the best that can serve the call.

    A row's result depends on nothing but its own query and the keys and values it sees: not on the batch, not on what
    is shared, not on how a prefill was cut, not on the number of threads; bit for bit, on one backend and device.
    Raises ValueError for shapes or lengths that do not fit.
    """
    _check(q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens)
    group, (block_size, dim) = q.shape[1] // k_cache.shape[1], k_cache.shape[2:]
    same = q.dtype == k_cache.dtype == v_cache.dtype
    fits_cpp = same and dim % 8 == 0 and dim <= 256 and block_size % 8 == 0
    fits_triton = (
        same
        and q.dtype != torch.float64
        and group <= 64
        and dim <= 256
        and k_cache.stride() == v_cache.stride()
        and k_cache.stride(-1) == 1
    )
    chosen = choose(
        "paged_attention", backend, q, k_cache, v_cache, cpp=fits_cpp, triton=fits_triton, cpp_dtypes=FP32_BF16
    )
    if chosen == "reference":
        return paged_attention_reference(q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, scale)
    if chosen == "cpp":
        share = plan is None or plan.share
        return torch.ops.axpo.paged_attention(
            q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, scale, share
        )
    from kernels.paged_attention.triton import paged_attention_triton

    if plan is None or plan.buffer is None:
        tables, starts, lengths = block_tables.cpu(), cu_seqlens_q.cpu(), context_lens.cpu()
        share = plan is None or plan.share
        plan = paged_plan(tables, starts, lengths, q.shape[1], k_cache, share=share, backend="triton")
    return paged_attention_triton(q, k_cache, v_cache, block_tables, plan, scale)


def paged_plan(
    block_tables: torch.Tensor | np.ndarray,
    cu_seqlens_q: torch.Tensor | np.ndarray,
    context_lens: torch.Tensor | np.ndarray,
    q_heads: int,
    k_cache: torch.Tensor,
    share: bool = True,
    into: PagedPlan | None = None,
    tile: PagedTile | None = None,
    backend: str | None = None,
) -> PagedPlan:
    """Decides what the paged attention of one step reads together. Call it once a step, and give it to every layer.

    block_tables, cu_seqlens_q, context_lens: as for paged_attention, on the host. q_heads: Hq. k_cache: of any layer.
    share: whether sequences whose tables begin alike read those keys once. The result's bits do not depend on it.
    into: a plan of `fixed_paged_plan`, which is rewritten in place (ordered after what runs on the current stream) and
    returned. tile: sizes other than the device's, for tests. backend: what the calls will run on.
    Raises PlanOverflow when the step does not fit `into`, ValueError for lengths that do not fit.
    """
    # What needs no work list costs nothing here; the exact choice is made by the call itself.
    on_triton = choose("paged_plan", backend, k_cache, cpp_dtypes=(k_cache.dtype,)) == "triton"
    if not on_triton:
        return PagedPlan(share)
    tables, starts, lengths = np.asarray(block_tables), np.asarray(cu_seqlens_q), np.asarray(context_lens)
    tile = tile or (into.tile if into else None) or device_tile(k_cache.device)
    _, kv_heads, block_size, dim = k_cache.shape
    _check_lengths(tables, starts, lengths, block_size)
    shape = q_heads // kv_heads, kv_heads, dim, block_size, k_cache.element_size()
    work = build(tables, starts, lengths, tile, *shape, share)
    return upload(work, tile, k_cache.device, share, into)


def fixed_paged_plan(
    max_tokens: int, max_context: int, device: torch.device, share: bool = True, tile: PagedTile | None = None
) -> PagedPlan:
    """An empty plan at addresses that stay, for CUDA graphs: capture with it, and `paged_plan(..., into=it)` before
    each replay. It takes steps of up to max_tokens query tokens with contexts up to max_context.

    A call with it allocates max_tokens * ceil(max_context / split) * Hq * (D + 1) * 4 bytes for partial results.
    """
    return fixed_plan(max_tokens, max_context, tile or device_tile(device), device, share)


def why_not_compiled(
    device: torch.device, dtype: torch.dtype, group: int, head_dim: int, block_size: int
) -> str | None:
    """Why no compiled form serves calls with these sizes, and what would help; None when one does.

    group: Hq / Hk. Where AXPO_KERNELS names the form, that one serves, and there is nothing to ask.
    """
    if MODE != "auto":
        return None
    if device.type == "cuda":
        if not TRITON:
            return "triton is not installed; pip install triton"
        if dtype == torch.float64 or group > 64 or head_dim > 256:
            return f"{dtype}, {group} query heads a KV head, head_dim {head_dim}: beyond 32 bits, 64 or 256"
        split = device_tile(device).split
        return f"block_size {block_size} does not divide the split of {split} tokens" if split % block_size else None
    if not LOADED:
        return "the C++ kernels are not built; python setup.py build_ext --inplace"
    if dtype not in FP32_BF16:
        return f"dtype is {dtype}, and the C++ kernel takes fp32 and bf16"
    if head_dim % 8 or head_dim > 256:
        return f"head_dim is {head_dim}, and the C++ kernel takes multiples of 8 up to 256"
    return f"block_size is {block_size}; give a multiple of 8" if block_size % 8 else None


def device_tile(device: torch.device) -> PagedTile:
    """The tile sizes frozen for the device (kernels/tiles.toml)."""
    from kernels._triton import tiles

    sizes = tiles("paged_attention", device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return PagedTile(sizes["rows"], sizes["split"], processors * sizes["programs"])


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
) -> None:
    if q.dim() != 3 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape or q.shape[2] != k_cache.shape[3]:
        raise ValueError(
            f"paged_attention: q {tuple(q.shape)} must be [T, Hq, D], and k_cache {tuple(k_cache.shape)} and v_cache "
            f"{tuple(v_cache.shape)} [num_blocks, Hk, block_size, D] with the same D"
        )
    if k_cache.shape[1] == 0 or q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"paged_attention: {q.shape[1]} query heads are not a multiple of {k_cache.shape[1]} KV heads")
    sequences = context_lens.shape[0]
    if block_tables.dim() != 2 or block_tables.shape[0] != sequences or cu_seqlens_q.shape != (sequences + 1,):
        raise ValueError(
            f"paged_attention: with context_lens {tuple(context_lens.shape)} = [S], block_tables "
            f"{tuple(block_tables.shape)} must be [S, max_blocks] and cu_seqlens_q {tuple(cu_seqlens_q.shape)} [S + 1]"
        )
    for name, tensor in (
        ("block_tables", block_tables),
        ("cu_seqlens_q", cu_seqlens_q),
        ("context_lens", context_lens),
    ):
        if tensor.dtype != torch.int32:
            raise ValueError(f"paged_attention: {name} is {tensor.dtype}: convert it to int32")


def _check_lengths(tables: np.ndarray, starts: np.ndarray, contexts: np.ndarray, block_size: int) -> None:
    tokens = np.diff(starts)
    if starts[0] != 0 or (tokens < 0).any():
        raise ValueError(f"paged_plan: cu_seqlens_q {starts.tolist()} must begin with 0 and not decrease")
    for s in np.flatnonzero((tokens > 0) & ((contexts < tokens) | (contexts > tables.shape[1] * block_size)))[:1]:
        raise ValueError(
            f"paged_plan: sequence {s} of {contexts[s]} tokens has {tokens[s]} queries, and its table has room for "
            f"{tables.shape[1] * block_size} tokens"
        )


if LOADED:

    @torch.library.register_fake("axpo::paged_attention")
    def _fake(q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, scale, share=True):
        return q.new_empty(q.shape)

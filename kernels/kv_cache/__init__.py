"""Writes into the paged KV cache: the tokens of a step, and the copied part of a block that a fork must own."""

import torch

from kernels._library import LOADED, choose
from kernels.kv_cache.reference import copy_blocks_reference, write_kv_reference

__all__ = ["copy_blocks", "copy_blocks_reference", "write_kv", "write_kv_reference"]

_CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The hand-written CUDA kernel (csrc/cuda) is the same operator; it is there when the extension was built with nvcc.
_CUDA_COPY = LOADED and torch._C._dispatch_has_kernel_for_dispatch_key("axpo::copy_blocks", "CUDA")


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    backend: str | None = None,
) -> None:
    """Stores the keys and values of T tokens in the cache, in place.

    k, v: [T, Hk, D]. k_cache, v_cache: [num_blocks, Hk, block_size, D]; values are converted to the cache's dtype.
    slot_mapping: [T] int64, slot = block * block_size + offset, no slot twice; -1 leaves a token out, as what fills
    up a captured graph's batch.
    backend: "triton", "cpp" (k and v of the cache's dtype: fp32, bf16 or fp16) or "reference"; default: the best.
    Raises ValueError for shapes that do not fit, and IndexError for a slot outside the cache; "triton", which cannot
    look without waiting for the device, leaves such a token out.
    """
    if k.shape != v.shape or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"write_kv: k {tuple(k.shape)} and v {tuple(v.shape)}, and k_cache {tuple(k_cache.shape)} and v_cache "
            f"{tuple(v_cache.shape)}, must have equal shapes"
        )
    if k.dim() != 3 or k_cache.dim() != 4 or k.shape[1] != k_cache.shape[1] or k.shape[2] != k_cache.shape[3]:
        raise ValueError(
            f"write_kv: k {tuple(k.shape)} must be [T, Hk, D] with the Hk and D of k_cache {tuple(k_cache.shape)}, "
            "which is [num_blocks, Hk, block_size, D]"
        )
    if slot_mapping.shape != k.shape[:1] or slot_mapping.dtype != torch.int64:
        raise ValueError(
            f"write_kv: slot_mapping {tuple(slot_mapping.shape)} {slot_mapping.dtype} must be int64 of shape "
            f"({k.shape[0]},)"
        )
    same = k.dtype == v.dtype == k_cache.dtype == v_cache.dtype
    narrow = all(t.dtype != torch.float64 for t in (k, v, k_cache, v_cache))
    alike = k_cache.stride() == v_cache.stride()
    chosen = choose(
        "write_kv", backend, k, v, k_cache, v_cache, cpp=same, triton=narrow and alike, cpp_dtypes=_CPP_DTYPES
    )
    if chosen == "triton":
        import kernels.kv_cache.triton  # noqa: F401  registers the operator

        torch.ops.axpo.triton_write_kv(k, v, k_cache, v_cache, slot_mapping)
    elif chosen == "cpp":
        torch.ops.axpo.write_kv(k, v, k_cache, v_cache, slot_mapping)
    else:
        write_kv_reference(k, v, k_cache, v_cache, slot_mapping)


def copy_blocks(
    kv: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, valid: torch.Tensor, backend: str | None = None
) -> None:
    """Copies the first valid[p] tokens of block src[p] into block dst[p], for every layer and head, in place.

    kv: [L, 2, num_blocks, Hk, block_size, D]. src, dst, valid: [P] int64. The dst are distinct and none is also a src.
    What lies beyond the valid tokens of a dst block is left as it is.
    backend: "triton", "cpp" (C++ on the CPU: fp32, bf16, fp16; the CUDA kernel of csrc/cuda where it was built: any
    dtype) or "reference"; default: the best. The first two want kv contiguous.
    Raises ValueError for shapes that do not fit, and on the CPU IndexError for a block outside kv.
    """
    if kv.dim() != 6 or not src.shape == dst.shape == valid.shape or src.dim() != 1:
        raise ValueError(
            f"copy_blocks: kv {tuple(kv.shape)} must be [L, 2, num_blocks, Hk, block_size, D], and src "
            f"{tuple(src.shape)}, dst {tuple(dst.shape)}, valid {tuple(valid.shape)} must be [P]"
        )
    for name, index in (("src", src), ("dst", dst), ("valid", valid)):
        if index.dtype != torch.int64:
            raise ValueError(f"copy_blocks: {name} is {index.dtype}: convert it to int64")
    dense = kv.is_contiguous()
    if kv.is_cuda and _CUDA_COPY and dense and backend in (None, "cpp"):
        chosen = "cpp"
    else:
        chosen = choose("copy_blocks", backend, kv, cpp=dense, triton=dense, cpp_dtypes=_CPP_DTYPES)
    if chosen == "triton":
        import kernels.kv_cache.triton  # noqa: F401  registers the operator

        torch.ops.axpo.triton_copy_blocks(kv, src, dst, valid)
    elif chosen == "cpp":
        torch.ops.axpo.copy_blocks(kv, src, dst, valid)
    else:
        copy_blocks_reference(kv, src, dst, valid)


if LOADED:  # nothing is returned: only that these can be traced

    @torch.library.register_fake("axpo::write_kv")
    def _fake_write_kv(k, v, k_cache, v_cache, slot_mapping):
        return None

    @torch.library.register_fake("axpo::copy_blocks")
    def _fake_copy_blocks(kv, src, dst, valid):
        return None

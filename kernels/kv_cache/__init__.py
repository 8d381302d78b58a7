"""Writes into the paged KV cache: the tokens of a step, and the copied part of a block that a fork must own."""

import torch

from kernels._library import LOADED, use_cpp


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Stores the keys and values of T tokens in the cache, in place.

    k, v: [T, Hk, D]. k_cache, v_cache: [num_blocks, Hk, block_size, D]; values are converted to the cache's dtype.
    slot_mapping: [T] int64, slot = block * block_size + offset, no slot twice.
    Raises IndexError for a slot outside the cache, ValueError for shapes that do not fit.
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
    if use_cpp(k, v, k_cache, v_cache):
        torch.ops.axpo.write_kv(k, v, k_cache, v_cache, slot_mapping)
    else:
        write_kv_reference(k, v, k_cache, v_cache, slot_mapping)


def write_kv_reference(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """write_kv in plain torch, on any device and in any dtype."""
    block_size = k_cache.shape[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    k_cache[block, :, offset] = k.to(k_cache.dtype)
    v_cache[block, :, offset] = v.to(v_cache.dtype)


def copy_blocks(kv: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, valid: torch.Tensor) -> None:
    """Copies the first valid[p] tokens of block src[p] into block dst[p], for every layer and head, in place.

    kv: [L, 2, num_blocks, Hk, block_size, D]. src, dst, valid: [P] int64. The dst are distinct and none is also a src.
    What lies beyond the valid tokens of a dst block is left as it is. Raises IndexError for a block outside kv.
    """
    if kv.dim() != 6 or not src.shape == dst.shape == valid.shape or src.dim() != 1:
        raise ValueError(
            f"copy_blocks: kv {tuple(kv.shape)} must be [L, 2, num_blocks, Hk, block_size, D], and src "
            f"{tuple(src.shape)}, dst {tuple(dst.shape)}, valid {tuple(valid.shape)} must be [P]"
        )
    if use_cpp(kv):
        torch.ops.axpo.copy_blocks(kv, src, dst, valid)
    else:
        copy_blocks_reference(kv, src, dst, valid)


def copy_blocks_reference(kv: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, valid: torch.Tensor) -> None:
    """copy_blocks in plain torch, on any device and in any dtype."""
    offset = torch.arange(kv.shape[4], device=kv.device)
    copied = (offset < valid[:, None])[:, None, :, None]  # [P, 1, block_size, 1] against [L, 2, P, Hk, block_size, D]
    kv[:, :, dst] = torch.where(copied, kv[:, :, src], kv[:, :, dst])


if LOADED:  # nothing is returned: only that these can be traced

    @torch.library.register_fake("axpo::write_kv")
    def _fake_write_kv(k, v, k_cache, v_cache, slot_mapping):
        return None

    @torch.library.register_fake("axpo::copy_blocks")
    def _fake_copy_blocks(kv, src, dst, valid):
        return None

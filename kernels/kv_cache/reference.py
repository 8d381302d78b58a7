"""The writes into the paged KV cache in plain torch, on any device and in any dtype."""

import torch


def write_kv_reference(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    kept = slot_mapping != -1
    k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    block_size = k_cache.shape[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    k_cache[block, :, offset] = k.to(k_cache.dtype)
    v_cache[block, :, offset] = v.to(v_cache.dtype)


def copy_blocks_reference(kv: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, valid: torch.Tensor) -> None:
    offset = torch.arange(kv.shape[4], device=kv.device)
    copied = (offset < valid[:, None])[:, None, :, None]  # [P, 1, block_size, 1] against [L, 2, P, Hk, block_size, D]
    kv[:, :, dst] = torch.where(copied, kv[:, :, src], kv[:, :, dst])

"""Triton's cache writes in the interpreter: exact copies, in place, and nothing else touched."""

import pytest
import torch

pytest.importorskip("triton")
import kernels.kv_cache.triton  # noqa: F401  registers the operators
from kernels import copy_blocks, write_kv
from kernels.kv_cache import copy_blocks_reference, write_kv_reference


@pytest.mark.parametrize(
    ("heads", "dim", "dtype", "cache_dtype"),
    [
        (3, 24, torch.float32, torch.float32),
        (8, 128, torch.bfloat16, torch.bfloat16),
        (5, 64, torch.float32, torch.bfloat16),
        (40, 64, torch.float16, torch.float16),
    ],
)
def test_write_puts_each_token_in_its_slot_and_leaves_the_rest(heads, dim, dtype, cache_dtype, generator):
    kv = torch.randn(2, 2, 5, heads, 16, dim, generator=generator).to(cache_dtype)
    found, expected = kv.clone(), kv.clone()
    projection = torch.randn(9, 2 * heads * dim + 1, generator=generator).to(dtype)[:, 1:]  # strided and misaligned
    k, v = (part.unflatten(1, (heads, dim)) for part in projection.chunk(2, dim=1))
    slots = torch.randperm(5 * 16, generator=generator)[:9]
    write_kv(k, v, found[1, 0], found[1, 1], slots, backend="triton")
    write_kv_reference(k, v, expected[1, 0], expected[1, 1], slots)
    assert torch.equal(found, expected)


def test_a_slot_outside_the_cache_is_left_out(generator):
    cache = torch.zeros(4, 2, 8, 16)
    k = torch.randn(3, 2, 16, generator=generator)
    write_kv(k, k, cache, cache.clone(), torch.tensor([-1, 5, 32]), backend="triton")
    assert torch.equal(cache[0, :, 5], k[1]) and (cache != 0).sum() == (k[1] != 0).sum()


@pytest.mark.parametrize(("block_size", "dim", "dtype"), [(16, 128, torch.bfloat16), (32, 24, torch.float32)])
def test_copy_takes_the_valid_tokens_of_every_layer_and_no_more(block_size, dim, dtype, generator):
    kv = torch.randn(2, 2, 9, 3, block_size, dim, generator=generator).to(dtype)
    kv[:, :, 0, :, block_size // 2 :] = torch.nan  # behind the valid tokens
    src, dst = torch.tensor([0, 3, 3, 1]), torch.tensor([5, 8, 2, 7])
    partial = int(torch.randint(1, block_size, (1,), generator=generator))
    valid = torch.tensor([block_size // 2, 0, block_size, partial])
    found, expected = kv.clone(), kv.clone()
    copy_blocks(found, src, dst, valid, backend="triton")
    copy_blocks_reference(expected, src, dst, valid)
    for a, b, count in zip(src, dst, valid, strict=True):
        assert torch.equal(expected[:, :, b, :, :count], kv[:, :, a, :, :count])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_nothing_to_write_or_copy():
    kv, none = torch.ones(1, 2, 2, 1, 8, 8), torch.empty(0, dtype=torch.int64)
    write_kv(torch.empty(0, 1, 8), torch.empty(0, 1, 8), kv[0, 0], kv[0, 1], none, backend="triton")
    copy_blocks(kv, none, none, none, backend="triton")
    assert torch.equal(kv, torch.ones(1, 2, 2, 1, 8, 8))


def test_a_cache_of_more_than_2_to_the_31_elements(generator):
    heads, size, dim = 8, 16, 256
    blocks = 2**31 // (heads * size * dim) + 3
    kv = torch.empty(1, 2, blocks, heads, size, dim, dtype=torch.float16)  # pages not written take no memory
    k, v = torch.randn(2, 1, heads, dim, generator=generator).half()
    slot = torch.tensor([(blocks - 2) * size + 4])
    write_kv(k, v, kv[0, 0], kv[0, 1], slot, backend="triton")
    pair = torch.tensor([blocks - 2]), torch.tensor([blocks - 1]), torch.tensor([size])
    copy_blocks(kv, *pair, backend="triton")
    for block in (blocks - 2, blocks - 1):
        assert torch.equal(kv[0, 0, block, :, 4], k[0]) and torch.equal(kv[0, 1, block, :, 4], v[0])


def test_opcheck(generator):
    cache = torch.zeros(4, 2, 8, 16)
    k, v = torch.randn(2, 3, 2, 16, generator=generator)
    slots = torch.tensor([0, 9, 31])
    torch.library.opcheck(torch.ops.axpo.triton_write_kv.default, (k, v, cache, cache.clone(), slots))
    pairs = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([8, 3])
    torch.library.opcheck(torch.ops.axpo.triton_copy_blocks.default, (torch.randn(2, 2, 4, 2, 8, 16), *pairs))

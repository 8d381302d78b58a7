"""write_kv and copy_blocks: exact copies, in place, and nothing else touched."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import include_paths

from kernels import copy_blocks, write_kv
from kernels._library import LOADED
from kernels.kv_cache import copy_blocks_reference, write_kv_reference

needs_cpp = pytest.mark.skipif(not LOADED, reason="the C++ kernels are not built")


def fresh_seed() -> int:
    return int(np.random.SeedSequence().entropy % 2**32)


@pytest.mark.parametrize("function", [write_kv, write_kv_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_puts_each_token_in_its_slot_and_leaves_the_rest(function, dtype):
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    blocks, heads, block_size, dim, tokens = 9, 3, 16, 24, 40
    k_cache, v_cache = (torch.randn(blocks, heads, block_size, dim, generator=generator).to(dtype) for _ in range(2))
    k, v = (torch.randn(tokens, heads, dim, generator=generator) for _ in range(2))
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for t, slot in enumerate(slots.tolist()):
        expected_k[slot // block_size, :, slot % block_size] = k[t].to(dtype)
        expected_v[slot // block_size, :, slot % block_size] = v[t].to(dtype)
    function(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache, expected_k) and torch.equal(v_cache, expected_v), f"seed {seed}"


def test_write_takes_strided_tokens_and_views_of_a_larger_cache():
    """As the engine calls it: k and v are slices of one projection, the caches layers of one tensor."""
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    kv = torch.zeros(2, 2, 5, 2, 8, 16)
    projection = torch.randn(6, 2 * 2 * 16, generator=generator)
    k, v = (part.unflatten(1, (2, 16)) for part in projection.chunk(2, dim=1))
    assert not k.is_contiguous()
    slots = torch.tensor([39, 0, 8, 9, 17, 25])
    write_kv(k, v, kv[1, 0], kv[1, 1], slots)
    assert torch.equal(kv[1, 0][slots // 8, :, slots % 8], k) and torch.equal(kv[1, 1][slots // 8, :, slots % 8], v)
    assert kv[0].abs().sum() == 0, f"seed {seed}"


@pytest.mark.parametrize("backend", ["cpp", "reference", "triton"])
def test_slot_minus_one_leaves_a_token_out(backend):
    if backend == "cpp" and not LOADED:
        pytest.skip("the C++ kernels are not built")
    caches = [torch.zeros(4, 2, 8, 16) for _ in range(2)]
    k = torch.randn(4, 2, 16)
    write_kv(k, k + 1, *caches, torch.tensor([-1, 9, -1, 31]), backend=backend)
    expected = torch.zeros(4, 2, 8, 16)
    expected[1, :, 1], expected[3, :, 7] = k[1], k[3]
    assert torch.equal(caches[0], expected)
    assert torch.equal(caches[1], torch.where(expected != 0, expected + 1, 0.0))


def test_write_nothing():
    cache = torch.ones(2, 1, 8, 8)
    write_kv(torch.empty(0, 1, 8), torch.empty(0, 1, 8), cache, cache.clone(), torch.empty(0, dtype=torch.int64))
    assert torch.equal(cache, torch.ones(2, 1, 8, 8))


@needs_cpp
@pytest.mark.parametrize("slot", [-2, 32])
def test_a_slot_outside_the_cache_is_an_error_and_nothing_is_written(slot):
    k_cache, v_cache = torch.zeros(4, 2, 8, 16), torch.zeros(4, 2, 8, 16)
    with pytest.raises(IndexError, match=f"slot_mapping\\[1\\] = {slot} is outside the cache of 32 slots"):
        write_kv(torch.ones(2, 2, 16), torch.ones(2, 2, 16), k_cache, v_cache, torch.tensor([0, slot]))
    assert k_cache.abs().sum() == 0 and v_cache.abs().sum() == 0


@pytest.mark.parametrize("function", [copy_blocks, copy_blocks_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_copy_takes_the_valid_tokens_of_every_layer_and_no_more(function, dtype):
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    layers, blocks, heads, block_size, dim = 3, 12, 2, 16, 8
    kv = torch.randn(layers, 2, blocks, heads, block_size, dim, generator=generator).to(dtype)
    order = rng.permutation(blocks)
    src, dst = rng.choice(order[:6], size=5), order[6:11]  # a block may be copied more than once
    valid = np.array([0, block_size, *rng.integers(0, block_size + 1, size=3)])
    expected = kv.clone()
    for a, b, count in zip(src, dst, valid, strict=True):
        expected[:, :, b, :, :count] = kv[:, :, a, :, :count]
    function(kv, *(torch.from_numpy(x.astype(np.int64)) for x in (src, dst, valid)))
    assert torch.equal(kv, expected), f"seed {seed}"


def test_copy_leaves_garbage_behind_the_valid_tokens_alone():
    kv = torch.full((1, 2, 2, 1, 8, 8), torch.nan)
    kv[:, :, 0, :, :3] = 1.0
    kv[:, :, 1] = 2.0
    copy_blocks(kv, torch.tensor([0]), torch.tensor([1]), torch.tensor([3]))
    assert torch.equal(kv[:, :, 1, :, :3], torch.ones(1, 2, 1, 3, 8))
    assert torch.equal(kv[:, :, 1, :, 3:], torch.full((1, 2, 1, 5, 8), 2.0))


def test_copy_nothing():
    kv = torch.ones(1, 2, 2, 1, 8, 8)
    none = torch.empty(0, dtype=torch.int64)
    copy_blocks(kv, none, none, none)
    assert torch.equal(kv, torch.ones(1, 2, 2, 1, 8, 8))


@needs_cpp
def test_copy_mistakes_are_named():
    kv = torch.zeros(1, 2, 4, 1, 8, 8)
    with pytest.raises(IndexError, match="block 1 to 4, but there are 4 blocks"):
        copy_blocks(kv, torch.tensor([1]), torch.tensor([4]), torch.tensor([1]))
    with pytest.raises(IndexError, match="valid\\[0\\] = 9"):
        copy_blocks(kv, torch.tensor([1]), torch.tensor([2]), torch.tensor([9]))


def test_wrong_shapes_are_named():
    cache = torch.zeros(4, 2, 8, 16)
    k = torch.zeros(3, 2, 16)
    slots = torch.arange(3)
    with pytest.raises(ValueError, match="must have equal shapes"):
        write_kv(k, k[:2], cache, cache, slots)
    with pytest.raises(ValueError, match="with the Hk and D of k_cache"):
        write_kv(k[:, :1], k[:, :1], cache, cache, slots)
    with pytest.raises(ValueError, match="slot_mapping"):
        write_kv(k, k, cache, cache, slots.int())
    with pytest.raises(ValueError, match="copy_blocks"):
        copy_blocks(torch.zeros(2, 2, 4, 2, 8, 16), slots, slots[:2], slots)


@needs_cpp
def test_bfloat16_is_written_in_cpp():
    """Which the reference would do too, but slower: that the explicit choice serves it."""
    kv = torch.zeros(1, 2, 4, 2, 8, 16, dtype=torch.bfloat16)
    k, v = torch.randn(2, 3, 2, 16).bfloat16()
    slots = torch.tensor([0, 9, 31])
    write_kv(k, v, kv[0, 0], kv[0, 1], slots, backend="cpp")
    copy_blocks(kv, torch.tensor([1]), torch.tensor([2]), torch.tensor([2]), backend="cpp")
    assert torch.equal(kv[0, 0, 1, :, 1], k[1]) and torch.equal(kv[0, 1, 2, :, 1], v[1])
    with pytest.raises(ValueError, match="cannot serve this call"):
        write_kv(k.float(), v.float(), kv[0, 0], kv[0, 1], slots, backend="cpp")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there are no CUDA headers")
def test_the_binding_of_the_cuda_kernels_compiles(tmp_path):
    """The .cu files themselves: tests/kernels/test_aot.py."""
    made_by_cmake = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"  # a CPU build of torch lacks it
    made_by_cmake.parent.mkdir(parents=True)
    made_by_cmake.touch()
    toolkit = subprocess.run(["nvcc", "-x", "cu", "-E", "-dryrun", "-"], capture_output=True, text=True).stderr
    cuda = re.search(r"^#\$ TOP=(.*)$", toolkit, re.MULTILINE)
    assert cuda is not None, toolkit
    paths = [*include_paths("cpu"), f"{cuda.group(1).strip()}/include", str(tmp_path)]
    source = Path(__file__).parents[2] / "csrc" / "cuda" / "bindings.cpp"
    command = ["g++", "-fsyntax-only", "-std=c++20", *(flag for path in paths for flag in ("-isystem", path))]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr


@needs_cpp
def test_opcheck():
    cache = torch.zeros(4, 2, 8, 16)
    k, v = torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    torch.library.opcheck(torch.ops.axpo.write_kv.default, (k, v, cache, cache.clone(), torch.tensor([0, 9, 31])))
    pairs = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([8, 3])
    torch.library.opcheck(torch.ops.axpo.copy_blocks.default, (torch.randn(2, 2, 4, 2, 8, 16), *pairs))

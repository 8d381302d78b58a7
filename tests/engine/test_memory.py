"""Memory: the KV cache's size, sleep at both levels, arenas, and loading without a second copy of the weights."""

import ctypes
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from bench.fork_models import TextShape, write_random
from engine import LLM, SamplingParams
from engine.arena import HostArena, available_bytes, view
from engine.cuda_arena import CUDAError, Mapping
from engine.weights import read_tensors

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = list(range(20, 60))


def resident(name: str = "RssAnon") -> int:
    """Bytes of this process's own memory that are in use now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) << 10


def answer(llm: LLM) -> tuple[list[int], list[float]]:
    output = llm.generate([PROMPT], GREEDY, use_tqdm=False)[0].outputs[0]
    return output.token_ids, output.logprobs


def test_the_size_of_the_kv_cache(vl_checkpoint: Path) -> None:
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 20)
    assert 0 <= (1 << 20) - llm.stats()["kv_bytes"] < llm.kv.bytes_per_block
    before = available_bytes(CPU)
    llm = LLM(vl_checkpoint, kv_cache_fraction=0.01)
    assert llm.stats()["kv_bytes"] == pytest.approx(before / 100, rel=0.2)
    assert LLM(vl_checkpoint).stats()["kv_bytes"] == pytest.approx(1 << 29, rel=0.01)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_cache_bytes": 1 << 20, "kv_cache_fraction": 0.5}, "kv_cache_fraction=0.5: give one of them"),
        ({"kv_cache_fraction": 0.0}, "kv_cache_fraction=0.0 must be above 0 and at most 1"),
        ({"kv_cache_fraction": 1.5}, "kv_cache_fraction=1.5 must be above 0"),
        ({"kv_cache_bytes": 100}, "100 bytes; this model needs [0-9]+ bytes a block of 16 tokens"),
        ({"device": "meta"}, "device meta: the engine runs on 'cpu' and 'cuda'"),
    ],
)
def test_sizes_that_cannot_be(vl_checkpoint: Path, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(vl_checkpoint, **given)


def test_level_2_gives_the_weights_back_and_takes_them_at_the_same_addresses(vl_checkpoint: Path) -> None:
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 22)
    expected = answer(llm)
    addresses = {name: parameter.data_ptr() for name, parameter in llm.model.named_parameters()}
    state = {name: parameter.clone() for name, parameter in llm.model.named_parameters()}
    weight_bytes = llm.stats()["weight_bytes"]
    assert weight_bytes >= sum(parameter.nbytes for parameter in state.values())
    for _ in range(2):
        llm.sleep(level=2)
        stats = llm.stats()
        assert (stats["kv_bytes"], stats["weight_bytes"], stats["vision_bytes"]) == (0, 0, 0)
        with pytest.raises(RuntimeError, match=r"weights are asleep; call wake_up\(\)"):
            llm.update_weights(state)
        with pytest.raises(RuntimeError, match="asleep"):
            answer(llm)
        llm.wake_up(tags=["weights"])
        with pytest.raises(RuntimeError, match=rf"{len(state)} weights have no values.* reload_weights"):
            answer(llm)
        llm.update_weights(list(state.items())[:3])
        with pytest.raises(RuntimeError, match=f"{len(state) - 3} weights have no values"):
            answer(llm)
        llm.update_weights(state)
        with pytest.raises(RuntimeError, match="the engine is asleep"):
            answer(llm)
        llm.wake_up()
        assert answer(llm) == expected
        assert llm.stats()["weight_bytes"] == weight_bytes
        assert {name: parameter.data_ptr() for name, parameter in llm.model.named_parameters()} == addresses
    llm.sleep(level=2)
    llm.wake_up()
    llm.reload_weights()
    assert answer(llm) == expected
    with pytest.raises(ValueError, match="sleep level 3"):
        llm.sleep(level=3)
    with pytest.raises(ValueError, match="wake_up tag 'kv'"):
        llm.wake_up(tags=["kv"])


def test_an_engine_without_weights_says_so_until_it_has_them(vl_checkpoint: Path) -> None:
    llm = LLM(vl_checkpoint, load_format="dummy", kv_cache_bytes=1 << 22)
    with pytest.raises(RuntimeError, match="weights have no values"):
        answer(llm)
    llm.update_weights(read_tensors(vl_checkpoint))
    assert answer(llm) == answer(LLM(vl_checkpoint, kv_cache_bytes=1 << 22))


def test_weights_that_are_a_trainers_are_not_given_back(vl_checkpoint: Path) -> None:
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 22)
    expected = answer(llm)
    for parameter in llm.model.parameters():
        parameter.data = parameter.data.clone()  # as axpo points them at the trainer's storage
    llm.weights_updated()
    llm.sleep(level=2)
    llm.wake_up()
    tokens, logprobs = answer(llm)
    assert tokens == expected[0] and logprobs == pytest.approx(expected[1], abs=1e-5)


def test_a_host_arena_gives_its_pages_back() -> None:
    size = 1 << 26
    arena = HostArena(size, CPU)
    tensor = view(arena.bytes(), 256, (1 << 20,), torch.float32)
    arena.bytes().fill_(1)
    full = resident()
    arena.release()
    assert full - resident() > size * 0.9, "the pages are still there"
    arena.restore()
    assert not tensor.any()
    tensor[5] = 3.0
    assert arena.bytes()[256 + 20 : 256 + 24].view(torch.float32).item() == 3.0


def test_a_gpu_arena_makes_the_calls_that_the_driver_wants(tmp_path: Path) -> None:
    """Against cuda.h itself, and a driver made of mmap. What the GPU's driver says is in bench/gpu_suite.py."""
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = tmp_path / "libcuda_stub.so"
    source = Path(__file__).with_name("cuda_driver_stub.c")
    subprocess.run(["cc", "-shared", "-fPIC", f"-I{include}", "-o", library, source], check=True, capture_output=True)
    driver = ctypes.CDLL(str(library))
    driver.held.restype = ctypes.c_size_t
    mapping = Mapping(driver, (5 << 20) + 3, index=3)
    assert mapping.size.value == 6 << 20
    address = mapping.address.value
    for value in (1, 2):
        mapping.map()
        assert driver.held() == 6 << 20
        ctypes.memset(address, value, mapping.size.value)
        assert mapping.address.value == address
        mapping.unmap()
        assert driver.held() == 0
    mapping.map()
    mapping.free()
    with pytest.raises(CUDAError, match="cuMemCreate of 4294967296 bytes: out of memory"):
        Mapping(driver, 1 << 32, index=3).map()
    with pytest.raises(CUDAError, match=r"cuMemGetAllocationGranularity .*: invalid argument"):
        Mapping(driver, 1 << 20, index=2)


LOAD = """
import gc, json, resource, sys
import torch
from engine import LLM
LLM({small!r}, kv_cache_bytes=1 << 20)  # everything that is imported and made once
gc.collect()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
before = peak()
llm = LLM({large!r}, dtype=getattr(torch, {dtype!r}), kv_cache_bytes=1 << 22)
weights = sum(p.nbytes for p in llm.model.parameters())
print(json.dumps([before, peak(), weights, llm.stats()["peak_bytes"]]))
"""


def test_loading_takes_the_memory_of_one_model(tmp_path: Path, text_checkpoint: Path) -> None:
    """A checkpoint of 80 MB in bf16, as it is or cast to fp32, in a process of its own."""
    write_random(tmp_path / "large", TextShape(1024, 3072, 2, 16, 8, 8000, True))
    dtype = random.choice(["bfloat16", "float32"])
    code = LOAD.format(small=str(text_checkpoint), large=str(tmp_path / "large"), dtype=dtype)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, peak, weights, reported = json.loads(done.stdout)
    assert weights > 70e6
    assert peak - before < 1.25 * weights, f"{dtype}: {(peak - before) / weights:.2f} of the weights"
    assert reported == pytest.approx(peak, rel=0.02)


def test_every_tensor_is_read_once_and_its_mapping_ends(tmp_path: Path) -> None:
    write_random(tmp_path, TextShape(256, 512, 2, 2, 1, 4000, False))
    seen = []
    for name, tensor in read_tensors(tmp_path):
        assert tensor.sum().isfinite()
        seen.append(name)
        del tensor
        maps = Path("/proc/self/maps").read_text()
        assert str(tmp_path) not in maps, "the file is still mapped"
    assert len(seen) == len(set(seen)) == 2 * 11 + 3

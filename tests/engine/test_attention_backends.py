"""Attention backends: each attends as ours does over prompts, images, chunks and forks; the choice and its reasons."""

import random
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from engine import LLM, SamplingParams
from engine.attention import BACKENDS, Target, choose_backend, package
from tests.engine import flash_emulation
from tests.engine.checkpoints import IMAGE, VISION_END, VISION_START

CUDA = Target(torch.device("cuda"), torch.bfloat16, 32, 8, 128, 256)
CPU = Target(torch.device("cpu"), torch.float32, 4, 2, 16, 8)


def outcome(llm: LLM, seed: int) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
    """Tokens, log-probs and entropies of a mixed batch: text and images, greedy and sampled, forks at two places."""
    rng = random.Random(seed)
    prompts = []
    for images in (0, 1, 2):
        tokens, inputs = [rng.randrange(7, 260) for _ in range(rng.randint(1, 25))], []
        for _ in range(images):
            pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
            inputs.append(llm.processor.image(Image.fromarray(pixels)))
            tokens += [VISION_START, *[IMAGE] * inputs[-1].num_tokens, VISION_END, rng.randrange(7, 260)]
        prompts.append({"prompt_token_ids": tokens, "multi_modal_data": {"image": inputs}})
    greedy = [SamplingParams(temperature=0, max_tokens=8, ignore_eos=True) for _ in prompts]
    roots = [llm.open(prompt) for prompt in prompts]
    outputs = llm.run(roots, greedy)
    forks = [child for root in roots for child in root.fork(2) + root.fork(2, at=len(root) - 5)]
    outputs += llm.run(forks, [SamplingParams(max_tokens=4, seed=i, ignore_eos=True) for i in range(len(forks))])
    for sequence in roots + forks:
        sequence.close()
    assert llm.stats()["blocks_used"] == 0
    return [o.token_ids for o in outputs], [o.logprobs for o in outputs], [o.entropies for o in outputs]


@pytest.mark.parametrize("name", ["sdpa", "flash_attn", "xformers"])
def test_every_backend_attends_as_ours(name: str, vl_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(2**31)
    max_batch_tokens = random.Random(seed).choice([13, 512])  # in chunks, and at once
    sizes = {"kv_cache_bytes": 1 << 22, "block_size": 8, "max_batch_tokens": max_batch_tokens}
    expected = outcome(LLM(vl_checkpoint, attention="ours", **sizes), seed)
    llm = LLM(vl_checkpoint, attention="sdpa", **sizes)
    if name != "sdpa":  # they do not run here: their arguments are read by the emulation
        monkeypatch.setitem(sys.modules, "flash_attn", flash_emulation.flash_attn)  # type: ignore[arg-type]
        monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
        monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(fmha=flash_emulation.fmha))  # type: ignore[arg-type]
        llm.runner.attention = BACKENDS[name](llm.kv, llm.attention.target, share_prefixes=True)
    tokens, logprobs, entropies = outcome(llm, seed)
    assert tokens == expected[0], f"seed {seed}"
    for actual, other in zip(logprobs + entropies, expected[1] + expected[2], strict=True):
        np.testing.assert_allclose(actual, other, atol=1e-4, err_msg=f"seed {seed}")


def test_an_engine_says_what_it_chose_and_why(vl_checkpoint: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 20)
    lines = llm.explain().splitlines()
    assert lines[0].startswith("attention: ours (the best that can serve)")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["not flash_attn", "not xformers", "not sdpa", "steps"]
    assert "pip install 'axpo[flash-attn]'" in lines[1] and "attention='sdpa'" in lines[3]
    asked = LLM(vl_checkpoint, kv_cache_bytes=1 << 20, attention="sdpa")
    assert asked.explain().startswith("attention: sdpa (asked for)")
    assert asked.attention.name == "sdpa"


def test_an_automatic_choice_falls_back_and_says_so_once(vl_checkpoint: Path) -> None:
    with pytest.warns(UserWarning, match=r"'sdpa' is taken, as 'ours' cannot serve: block_size is 6; give") as caught:
        llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 20, block_size=6)
        llm.generate([[10, 20, 30]] * 3, SamplingParams(max_tokens=4), use_tqdm=False)
    assert sum("attention" in str(warning.message) for warning in caught) == 1
    assert caught[0].filename == __file__
    assert llm.attention.name == "sdpa"


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("best", CPU, r"attention='best' is not one of auto, ours, flash_attn, xformers, sdpa"),
        ("ours", Target(CPU.device, torch.float16, 4, 2, 16, 8), r"'ours' cannot .*float16.* takes fp32 and bf16"),
        ("ours", Target(CPU.device, torch.float32, 4, 2, 12, 8), r"head_dim is 12, .* multiples of 8 up to 256"),
        ("flash_attn", CPU, r"'flash_attn' cannot serve this engine: the flash-attn package is not installed; pip"),
        ("xformers", CPU, r"'xformers' cannot serve this engine: the xformers package is not installed; pip"),
    ],
)
def test_an_explicit_choice_that_cannot_serve_is_an_error(name: str, target: Target, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        choose_backend(name, target)


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_installed_packages_name_what_keeps_them_from_serving(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BACKENDS[name]
    monkeypatch.setattr(package, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend.why_not(CUDA) is None
    page = {"flash_attn": 256, "xformers": 64}[name]
    for change, reason in {
        ("device", torch.device("cpu")): "runs on CUDA, and the engine is on the CPU",
        ("dtype", torch.float32): "it takes bf16 and fp16; give dtype=torch.bfloat16",
        ("block_size", 16): f"block_size is 16, and its pages are multiples of {page} tokens; give block_size={page}",
        ("head_dim", 260): "head_dim is 260",
    }.items():
        field, value = change
        fields = {name: getattr(CUDA, name) for name in Target.__dataclass_fields__} | {field: value}
        assert reason in (backend.why_not(Target(**fields)) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "older than compute capability 8.0" in (backend.why_not(CUDA) or "")

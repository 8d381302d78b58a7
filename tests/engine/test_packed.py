"""Steps of a small model in one call: the numbers of the plain model, and no bit that depends on the company."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from engine import LLM, SamplingParams
from engine.models import PackedVision, VisionConfig
from engine.models.vision import VisionTower
from engine.outputs import RequestOutput
from kernels._library import LOADED, MODE
from tests.engine.checkpoints import IMAGE, VISION_END, VISION_START

pytestmark = pytest.mark.skipif(not LOADED or MODE == "reference", reason="the C++ kernels are not built")

PARAMS = SamplingParams(n=3, max_tokens=24, ignore_eos=True, seed=5)


def prompts_of(rng: random.Random, llm: LLM) -> list[dict]:
    prompts = []
    for images in (0, 1, 2, 0, 3):
        tokens, inputs = [rng.randrange(7, 260) for _ in range(rng.randint(3, 40))], []
        for _ in range(images):
            size = (rng.choice([16, 24, 40]), rng.choice([8, 32, 56]), 3)
            pixels = np.random.default_rng(rng.randrange(2**31)).integers(0, 256, size, dtype=np.uint8)
            inputs.append(llm.processor.image(Image.fromarray(pixels)))
            tokens += [VISION_START] + [IMAGE] * inputs[-1].num_tokens + [VISION_END, rng.randrange(7, 260)]
        prompts.append({"prompt_token_ids": tokens, "multi_modal_data": {"image": inputs}})
    return prompts


def bits(outputs: list[RequestOutput]) -> list[list[tuple]]:
    return [[(o.token_ids, o.logprobs, o.entropies) for o in output.outputs] for output in outputs]


def test_the_packed_steps_give_what_the_plain_model_gives(vl_checkpoint: Path) -> None:
    seed = random.randrange(2**31)
    packed, plain = (LLM(vl_checkpoint, kv_cache_bytes=1 << 22, block_size=size) for size in (16, 8))
    assert packed.runner.packed is not None and plain.runner.packed is None
    plain.runner.vision.packed = None
    prompts = prompts_of(random.Random(seed), packed)
    results = [llm.generate(prompts, PARAMS, use_tqdm=False) for llm in (packed, plain)]
    for one, other in zip(*results, strict=True):
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert a.token_ids == b.token_ids, f"seed {seed}"
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4, err_msg=f"seed {seed}")
            np.testing.assert_allclose(a.entropies, b.entropies, atol=1e-4, err_msg=f"seed {seed}")


def test_bits_depend_on_the_sequence_alone(vl_checkpoint: Path) -> None:
    """Company, chunks of a prefill, threads, forks or none: all the same."""
    seed = random.randrange(2**31)
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 22)
    prompts = prompts_of(random.Random(seed), llm)
    expected = bits(llm.generate(prompts, PARAMS, use_tqdm=False))
    alone = [llm.generate(prompt, PARAMS, use_tqdm=False)[0] for prompt in reversed(prompts)]
    assert bits(alone[::-1]) == expected, f"seed {seed}"
    chunked = LLM(
        vl_checkpoint, kv_cache_bytes=1 << 22, block_size=32, max_batch_tokens=19, enable_prefix_caching=False
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert bits(chunked.generate(prompts, PARAMS, use_tqdm=False)) == expected, f"seed {seed}"
    finally:
        torch.set_num_threads(threads)


def test_new_weights_reach_the_packed_ones(vl_checkpoint: Path) -> None:
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 22)
    prompt = prompts_of(random.Random(1), llm)[2]
    greedy = replace(PARAMS, n=1, temperature=0.0)
    before = bits(llm.generate(prompt, greedy, use_tqdm=False))
    state = {name: parameter.clone() for name, parameter in llm.model.named_parameters()}
    for name, parameter in state.items():
        llm.update_weights({name: parameter * 1.5})
        assert bits(llm.generate(prompt, greedy, use_tqdm=False)) != before, name
        llm.update_weights({name: parameter})
    assert bits(llm.generate(prompt, greedy, use_tqdm=False)) == before


@pytest.mark.parametrize(("hidden", "heads", "out"), [(96, 4, 128), (32, 2, 48), (64, 1, 40)])
def test_the_vision_tower_in_one_call(hidden: int, heads: int, out: int) -> None:
    config = VisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        depth=3,
        num_heads=heads,
        in_channels=3,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=out,
        num_position_embeddings=36,
        deepstack_visual_indexes=(0, 2),
        rope_theta=10000.0,
    )
    tower = VisionTower(config).requires_grad_(False)
    for parameter in tower.parameters():
        parameter.data = torch.randn_like(parameter) / (parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 3)
    grids = [(1, 8, 8), (1, 2, 6), (2, 4, 10), (1, 22, 14)]
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), 96)
    assert PackedVision.serves(tower)
    actual = PackedVision(tower)(pixels, grids)
    expected = tower.double()(pixels.double(), torch.tensor(grids))
    for one, other in zip((actual.embeds, *actual.deepstack), (expected.embeds, *expected.deepstack), strict=True):
        torch.testing.assert_close(one, other.float(), atol=2e-4, rtol=1e-4)


class Recorder(TorchDispatchMode):
    """The arguments, copied, of the first call of each operator of kernels.packed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("axpo.").removesuffix(".default")
        if name.startswith("packed_") and name not in self.calls:
            self.calls[name] = tree_map_only(torch.Tensor, lambda tensor: tensor.numpy().copy(), args)
        return func(*args, **(kwargs or {}))


def test_opcheck_of_calls_as_the_engine_makes_them(vl_checkpoint: Path) -> None:
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 22, num_scheduler_steps=4)
    with Recorder() as recorder:
        llm.generate(prompts_of(random.Random(1), llm)[:2], PARAMS, use_tqdm=False)
    assert recorder.calls.keys() == {"packed_forward", "packed_decode", "packed_vision"}
    for name, recorded in recorder.calls.items():
        arguments = tree_map_only(np.ndarray, torch.from_numpy, recorded)
        torch.library.opcheck(getattr(torch.ops.axpo, name).default, arguments)

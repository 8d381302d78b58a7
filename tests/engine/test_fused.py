"""Fused projections and whole layers in one call: the same numbers as operator by operator."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import LLM, SamplingParams
from engine.models import Qwen3VL, fuse_projections, to_empty
from kernels import can_run_layers

PARAMS = SamplingParams(n=3, max_tokens=20, ignore_eos=True, seed=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fixture", ["vl_checkpoint", "text_checkpoint"])
def test_a_layer_in_one_call_has_the_same_bits(
    fixture: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(fixture)
    llm = LLM(path, dtype=dtype, kv_cache_bytes=1 << 22, block_size=8, max_batch_tokens=37)
    if not can_run_layers(llm.kv.layer(0)[0]):
        pytest.skip("the C++ kernels are not built")
    seed = random.randrange(2**31)
    rng = random.Random(seed)
    prompts = [[rng.randrange(7, 260) for _ in range(rng.randint(3, 30))] for _ in range(5)]
    whole = llm.generate(prompts, PARAMS, use_tqdm=False)
    llm.reset_prefix_cache()
    llm.attention.whole_layers = False
    single = llm.generate(prompts, PARAMS, use_tqdm=False)
    for one, other in zip(whole, single, strict=True):
        assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs], f"seed {seed}"
        assert [o.logprobs for o in one.outputs] == [o.logprobs for o in other.outputs], f"seed {seed}"


def test_fused_projections_equal_separate_ones(vl_checkpoint: Path) -> None:
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 22, block_size=8)
    fused = llm.generate([[10, 20, 30, 40]], PARAMS, use_tqdm=False)[0]
    state = {name: parameter.clone() for name, parameter in llm.model.named_parameters()}
    for name, parameter in llm.model.named_parameters():
        parameter.data = state[name]  # storage of its own: nothing is adjacent any more
    llm.weights_updated()
    layer = llm.model.model.language_model.layers[0]
    assert layer.fused is None and layer.self_attn.fused is None and layer.mlp.fused is None
    separate = llm.generate([[10, 20, 30, 40]], PARAMS, use_tqdm=False)[0]
    for one, other in zip(fused.outputs, separate.outputs, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    to_empty(llm.model, torch.device("cpu")).load_state_dict(state)
    fuse_projections(llm.model)
    assert layer.fused is not None
    for name, parameter in llm.model.named_parameters():
        assert torch.equal(parameter, state[name]), name


def test_an_update_of_a_parameter_reaches_the_fused_weight(vl_checkpoint: Path) -> None:
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 22)
    assert isinstance(llm.model, Qwen3VL)
    layer = llm.model.model.language_model.layers[1]
    with torch.no_grad():
        layer.self_attn.k_proj.weight.zero_()
        layer.mlp.up_proj.weight.zero_()
    assert layer.self_attn.fused is not None and layer.mlp.fused is not None
    q = len(layer.self_attn.q_proj.weight)
    k = len(layer.self_attn.k_proj.weight)
    weight = layer.self_attn.fused[0]
    assert not weight[q : q + k].any() and weight[:q].any() and weight[q + k :].any()
    assert not layer.mlp.fused[0][len(layer.mlp.gate_proj.weight) :].any()

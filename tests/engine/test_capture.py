"""What a CUDA graph captures, run on fake CUDA tensors: nothing in it waits for the device or sends anything to it."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
from bench.fork_models import TextShape, write_config
from engine.attention import Target
from engine.attention.ours import Ours
from engine.graphs import DecodeGraphs
from engine.models import ModelConfig, Qwen3VL, adjacent_parameters
from tests.kernels.fake_cuda import DEVICE, fake_cuda

LAYERS, HEADS, KV_HEADS, DIM, BLOCK, BLOCKS = 3, 8, 2, 64, 16, 1 << 19  # 2³⁰ values a layer of K


@pytest.mark.parametrize("tied", [True, False])
def test_a_decode_step(tmp_path: Path, tied: bool) -> None:
    write_config(tmp_path, TextShape(256, 512, LAYERS, HEADS, KV_HEADS, 1000, tied), DIM)
    config = ModelConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = Qwen3VL(config).to(torch.bfloat16)
    with fake_cuda() as launches, torch.inference_mode():
        for module, name in itertools.chain(*adjacent_parameters(model)):
            like = getattr(module, name)
            setattr(module, name, nn.Parameter(torch.empty(like.shape, dtype=like.dtype, device=DEVICE), False))
        cache = torch.empty(LAYERS, 2, BLOCKS, KV_HEADS, BLOCK, DIM, dtype=torch.bfloat16, device=DEVICE)
        banned = torch.empty(2, dtype=torch.int64, device=DEVICE)
        kv = SimpleNamespace(layer=lambda index: (cache[index, 0], cache[index, 1]), num_blocks=BLOCKS)
        target = Target(DEVICE, torch.bfloat16, HEADS, KV_HEADS, DIM, BLOCK)
        graphs = DecodeGraphs(model, Ours(kv, target, True), banned, 16, 4096, capture=True)  # type: ignore[arg-type]
        bucket = graphs._bucket(8)
        graphs._compute(8, bucket.plan)  # what is made once, such as the table of angles
        launches.kernels.clear()
        with launches:
            graphs._compute(8, bucket.plan)
    # A layer's two norms, those of q and k, rotary, cache, attention, its merge, SwiGLU; the last norm; the sampler.
    layer = ["_forward"] * 3 + ["_rotate", "_write", "_attend", "_merge", "_forward", "_forward"]
    rest = ["_forward", "cut_kernel", "draw_kernel", "merge_kernel"]
    assert sorted(launches.kernels) == sorted(layer * LAYERS + rest)
    assert launches.operators.count("clone") == 2  # cos and sin, once; nothing is laid out anew layer by layer

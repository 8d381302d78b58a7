"""axpo.plan: exact counts, memory against what torch allocates, changes that make a recipe fit, and the command."""

import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from axpo.activations import checkpoint_layers
from axpo.cli import resolve
from axpo.config import Config
from axpo.flops import shape_of
from axpo.paths import model_directory
from axpo.plan import make_plan
from axpo.plan.__main__ import main
from axpo.plan.counts import Work, parameters, text_flops
from axpo.plan.devices import GPUS, find_device, host_memory, named_like
from axpo.plan.layout import Checkpointing
from axpo.plan.memory import block_bytes, kv_token_bytes, layer_bytes
from axpo.plan.shapes import Shape, model_shape, published_config, read_shape
from axpo.plan.timing import _decode
from axpo.plan.workload import assumed, measured
from axpo.tree import build_trees
from axpo.weights_sync import push_weights
from engine import LLM
from engine.models import ModelConfig, Predict, Qwen3VL, VisionInput
from engine.models.qwen3_vl import mrope_table
from engine.models.vision import frame_layout
from kernels import tree_attention
from tests.axpo.factory import IMAGE, algo_of, credit, random_group, random_step, write_checkpoint
from tests.axpo.learner_worker import batches, build_learner

NAMES = {
    "2b": "Qwen/Qwen3-VL-2B-Thinking",
    "4b": "/models/Qwen3-VL-4B-Instruct",
    "8b": "Qwen3-VL-8B-Thinking",
    "32b": "32b",
}
MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")


def config(*argv: str) -> Config:
    return resolve(Config, argv, recipe="mini")


@pytest.mark.parametrize("size", ["mini", *NAMES])
def test_parameters_are_those_of_the_model(size: str, tmp_path: Path):
    directory = model_directory("mini")
    if size != "mini":
        directory = tmp_path
        (tmp_path / "config.json").write_text(json.dumps(published_config(size)))
    with torch.device("meta"):
        model = Qwen3VL(ModelConfig.from_pretrained(directory))
    shape = model_shape(NAMES.get(size, size))
    assert shape == shape_of(model.config) == model_shape(str(directory))
    count = parameters(shape)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert count.total == sum(sizes.values())
    assert count.vision == sum(n for name, n in sizes.items() if ".visual." in name)
    assert count.vision_block == sum(n for name, n in sizes.items() if ".visual.blocks.0." in name)
    assert count.layer == sum(n for name, n in sizes.items() if ".layers.1." in name)
    assert count.embedding == sizes["model.language_model.embed_tokens.weight"]
    assert count.head == sizes.get("lm_head.weight", 0)
    groups = [count.vision - count.depth * count.vision_block, count.vision_block, count.layer]
    assert count.largest_group == max(groups)


def test_a_model_that_is_neither_here_nor_known():
    with pytest.raises(ValueError, match=r"model.path = 'Qwen/Qwen9-VL-7B'.*2b, 4b, 8b, 32b"):
        model_shape("Qwen/Qwen9-VL-7B")


def kept_bytes(config: ModelConfig, mode: Checkpointing, tokens: int, images: int) -> int:
    """What torch still holds of a forward pass that made `tokens` outputs, some of them of `images` of 64 patches."""
    model = Qwen3VL(config)
    checkpoint_layers(model.model.language_model.layers, mode)
    vision = None
    if config.vision is not None:
        checkpoint_layers(model.model.visual.blocks, mode)
        pixels = torch.randn(images * 64, config.vision.patch_dim)
        vision = VisionInput(pixels, torch.tensor([[1, 8, 8]] * images), torch.arange(images * 16))
    ids, ends = torch.zeros(tokens, dtype=torch.int64), torch.full((tokens,), tokens, dtype=torch.int32)
    positions, last = torch.arange(tokens).expand(3, tokens), torch.zeros(1, dtype=torch.int64)
    scale = config.text.head_dim**-0.5
    # Tables that are kept for good, one a configuration or an image size: no matter who came first.
    mrope_table(config.text, ids.device)
    frame_layout(8, 8, config.merge)
    gc.collect()
    gc.disable()  # what other tests left behind must not be freed in the middle
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        out = model(
            ids, positions, lambda _, q, k, v: tree_attention(q, k, v, ends, scale), vision, Predict(last, last)
        )
    gc.enable()
    assert out[0].requires_grad
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


@pytest.mark.parametrize("mode", MODES)
def test_activations_are_what_autograd_keeps(mode: Checkpointing):
    """Of one more layer, and of one more vision block: nothing else differs between the two models."""
    mini = ModelConfig.from_pretrained(model_directory("mini"))
    assert mini.vision is not None
    shape, tokens, images = shape_of(mini), 256, 2
    assert shape.vision is not None
    text = [
        kept_bytes(replace(mini, vision=None, text=replace(mini.text, num_layers=n)), mode, tokens, 0) for n in (2, 4)
    ]
    assert (text[1] - text[0]) / 2 == layer_bytes(shape.text, 4, mode) * tokens
    towers = [replace(mini.vision, depth=depth, deepstack_visual_indexes=(0,)) for depth in (2, 4)]
    tower = [kept_bytes(replace(mini, vision=vision), mode, tokens, images) for vision in towers]
    assert (tower[1] - tower[0]) / 2 == block_bytes(shape.vision, 4, mode) * images * 64


def test_memory_of_the_mini_model_is_what_it_allocates(tmp_path: Path):
    path = write_checkpoint(tmp_path / "model")
    learner = build_learner(path)
    learner.step(batches(0))
    kv_bytes = 2**22
    llm = LLM(path, dtype=torch.float32, kv_cache_bytes=kv_bytes)
    own = {p.data_ptr() for p in llm.model.parameters()}
    push_weights(learner.model, llm.model)
    settings = config("--model.path", str(path), "--rollout.kv_cache_bytes", str(kv_bytes), "--loss.kl_coef", "0.1")
    plan = make_plan(settings, GPUS["h100"], 1)
    of = plan.memory.of

    def held(model: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in model.parameters())

    assert learner.reference is not None
    assert of("fp32 masters") == held(learner.model)
    assert of("reference policy") == held(learner.reference)
    moments = [t for state in learner.optimizer.state.values() for n, t in state.items() if n.startswith("exp_avg")]
    assert of("optimizer") == sum(t.numel() * t.element_size() for t in moments)
    assert of("gradients") == held(learner.model), "a gradient has the dtype and the shape of its master"
    assert of("engine weights") == 0 and not own & {p.data_ptr() for p in llm.model.parameters()}
    block = kv_token_bytes(plan.shape, 4) * llm.pool.block_size
    assert llm.kv.bytes_per_block == block and llm.kv.nbytes == kv_bytes // block * block
    assert plan.kv_tokens // llm.pool.block_size == llm.stats()["blocks_total"]


def test_sharding_and_offload_move_what_they_say():
    base = ["qwen3-vl-8b"]
    h100 = GPUS["h100"]
    one, eight = (make_plan(config(*base), h100, ranks).memory for ranks in (1, 8))
    for kind in ("fp32 masters", "optimizer", "gradients", "reference policy"):
        assert eight.of(kind) == pytest.approx(one.of(kind) / 8)
    assert eight.of("engine weights") == one.of("engine weights") == 2 * parameters(model_shape("8b")).total
    two_nodes = make_plan(config(*base, "--train.replicas", "2"), h100, 16, 2).memory
    assert two_nodes.of("fp32 masters") == eight.of("fp32 masters"), "a replica is sharded over its node"
    offloaded = make_plan(config(*base, "--train.optimizer_offload", "--train.reference_offload"), h100, 8).memory
    saved = eight.of("optimizer") + eight.of("reference policy")
    assert eight.peak("train") - offloaded.peak("train") == pytest.approx(saved)
    assert offloaded.host - eight.host == pytest.approx(saved)
    frozen = make_plan(config(*base, "--train.freeze_vision"), h100, 8).memory
    vision = parameters(model_shape("8b")).vision
    assert eight.of("optimizer") - frozen.of("optimizer") == pytest.approx(8 * vision / 8)
    asleep = make_plan(config(*base, "--rollout.sleep_in_training", "always"), h100, 8).memory
    awake = make_plan(config(*base, "--rollout.sleep_in_training", "never"), h100, 8).memory
    assert awake.peak("train") - asleep.peak("train") == awake.of("KV cache")


def test_what_it_says_to_change_makes_it_fit():
    options = ["qwen3-vl-8b", "--train.activation_checkpointing", "none", "--train.micro_batch_tokens", "65536"]
    plan = make_plan(config(*options), GPUS["a100-40"], 8)
    assert not plan.fits and plan.changes
    assert "does not fit" in plan.warnings[0] and all(
        f"{name} {value}" in plan.warnings[0] for name, value in plan.changes
    )
    changed = make_plan(config(*options, *(word for change in plan.changes for word in change)), GPUS["a100-40"], 8)
    assert changed.fits and not any("does not fit" in warning for warning in changed.warnings)


def test_numbers_that_do_not_divide_name_the_nearest():
    with pytest.raises(ValueError, match=r"questions_per_step = 64: .*48 ranks.*--rollout.questions_per_step 48"):
        make_plan(config("mini"), GPUS["h100"], 48, 6)
    with pytest.raises(ValueError, match=r"--gpus 8: not a multiple of --nodes 3"):
        make_plan(config("mini"), GPUS["h100"], 8, 3)
    with pytest.raises(ValueError, match=r"train.replicas = 3: not a divisor of 8 ranks"):
        make_plan(config("mini", "--train.replicas", "3"), GPUS["h100"], 8)


def test_more_of_anything_takes_longer_and_faster_devices_less():
    load = ["--rollout.questions_per_step", "64"]
    plan = make_plan(config("qwen3-vl-8b", *load), GPUS["h100"], 8)
    time = plan.timing
    assert time.step == pytest.approx(time.rollout + time.resample + time.train + time.weights)
    assert make_plan(config("qwen3-vl-8b", *load), GPUS["h200"], 8).timing.rollout < time.rollout, (
        "decoding reads memory"
    )
    assert make_plan(config("qwen3-vl-8b", *load), GPUS["b200"], 8).timing.train < time.train
    assert make_plan(config("qwen3-vl-2b", *load), GPUS["h100"], 8).timing.step < time.step
    half = make_plan(config("qwen3-vl-8b", *load), GPUS["h100"], 16, 2).timing
    assert half.train < time.train and half.rollout < time.rollout
    grpo = make_plan(config("qwen3-vl-8b", *load, "--algo.name", "grpo"), GPUS["h100"], 8).timing
    assert grpo.resample == 0 and grpo.train < time.train
    overlapped = make_plan(config("qwen3-vl-8b", *load, "--rollout.overlap"), GPUS["h100"], 8)
    assert overlapped.timing.step < time.step and overlapped.memory.needed > plan.memory.needed
    assert 0 < plan.mfu < GPUS["h100"].train_efficiency, "the reference policy and recomputation take time as well"


def test_thousands_of_gpus():
    settings = config("qwen3-vl-8b", "--rollout.questions_per_step", "4096", "--train.replicas", "512")
    plan = make_plan(settings, GPUS["h100"], 4096, 512)
    assert plan.fits and plan.layout.shards == 8
    assert plan.timing.traffic.gather == pytest.approx(
        plan.timing.micro_batches * 3 * 2 * plan.parameters.total * 7 / 8
    ), "forward, backward, reference; bf16; seven eighths come from the other ranks"


def test_decoding_time_is_the_sum_over_live_sequences():
    """A step costs one second and one more a sequence; lengths spread from 0 to 20, so that the mean is 10."""

    def step(count: float) -> tuple[float, str]:
        return 1.0 + count, "memory"

    assert _decode(step, 8, 10, 20, 8) == pytest.approx(20 + 80, rel=0.01), "20 steps, 80 tokens"
    assert _decode(step, 8, 10, 10, 8) == pytest.approx(10 + 80), "all of one length"
    assert _decode(step, 16, 10, 10, 8) == pytest.approx(20 + 160), "eight wait for eight"


def test_lengths_of_a_run(tmp_path: Path):
    import random

    rng = random.Random(7)
    groups = [random_group(rng, number) for number in range(3)]
    rollouts = [rollout for group in groups for rollout in group]
    folder = tmp_path / "trajectories"
    folder.mkdir()
    (folder / "step_000001.jsonl").write_text("".join(f"{rollout.to_json()}\n" for rollout in rollouts))
    shape = replace(model_shape("mini"), image_token=IMAGE)
    load = measured(tmp_path, shape)
    assert (load.questions, load.group_size, load.continuations) == (3, 4, 0)
    assert load.prompt == pytest.approx(sum(r.prompt_len for r in rollouts) / 12)
    assert load.sampled == pytest.approx(sum(r.roles.count(1) for r in rollouts) / 12)
    assert load.longest == max(r.roles.count(1) for r in rollouts)
    images = sum(r.tokens.count(IMAGE) for r in rollouts) / 12
    assert load.prompt_image + load.observed_image == pytest.approx(images)
    # The packed trees hold what it counts, but for the last token of every path, from which nothing is predicted.
    for rollout in rollouts:
        rollout.loss_mask = [int(role == 1) for role in rollout.roles]
    packed = sum(tree.num_tokens for group in groups for tree in build_trees(group, {}, IMAGE))
    assert load.training(shape).tokens == pytest.approx(packed + len(rollouts))


@pytest.mark.parametrize("recipe", ["mini", "no-tool-target", "no-prefix-fix", "arpo"])
def test_training_is_as_long_as_the_trees_that_a_recipe_packs(recipe: str, tmp_path: Path):
    algo = algo_of(recipe)
    groups, resamples = random_step(11, algo, groups=60)
    credit(groups, resamples, algo)
    everything = [t for trajectories in (*groups, *resamples.values()) for t in trajectories]
    folder = tmp_path / "trajectories"
    folder.mkdir()
    (folder / "step_000001.jsonl").write_text("".join(f"{trajectory.to_json()}\n" for trajectory in everything))
    shape = replace(model_shape("mini"), image_token=IMAGE)
    load = measured(tmp_path, shape)
    to_the_end = recipe in ("no-prefix-fix", "arpo")
    assert load.continuations > 30 and (load.left_out == 0) == to_the_end
    trees = [tree for group in groups for tree in build_trees(group, resamples, IMAGE)]
    # Nothing is predicted from the last token of a path, which is left out of the tree.
    paths = 240 + load.continuations - (0 if to_the_end else len(resamples))
    packed = sum(tree.num_tokens for tree in trees) + paths
    assert load.training(shape).tokens == pytest.approx(packed)


def test_assumed_training_of_a_recipe_counts_the_sources_that_it_keeps():
    settings = {recipe: config("mini", *([recipe] if recipe else [])) for recipe in ("", "arpo", "no-prefix-fix")}
    shape = model_shape("mini")
    loads = {recipe: assumed(one, shape, {}) for recipe, one in settings.items()}
    axpo, arpo, fresh = (loads[recipe] for recipe in ("", "arpo", "no-prefix-fix"))
    assert (arpo.left_out, fresh.left_out, fresh.kept) == (0, 0, 0) and axpo.kept == arpo.kept > 0
    sources = axpo.continuations / axpo.resamples_per_prefix
    more = arpo.training(shape).tokens - axpo.training(shape).tokens
    assert more == pytest.approx(sources * (axpo.resampled + axpo.reobserved))
    assert fresh.training(shape).tokens == pytest.approx(
        fresh.questions * fresh.prompt
        + fresh.rollouts * (fresh.sampled + fresh.observed)
        + fresh.continuations * (fresh.sampled + fresh.reobserved)
    )


def test_flops_of_a_layer_are_two_a_weight():
    shape = model_shape("mini")
    bare = replace(shape, text=replace(shape.text, layers=1))
    one = Work(tokens=1)
    matrices = parameters(shape).layer - 2 * shape.text.hidden - 2 * shape.text.head_dim
    assert text_flops(bare, one) == 2 * matrices
    assert text_flops(bare, Work(predicted=1)) == 2 * parameters(shape).embedding


def test_devices():
    cpu = find_device("cpu", ranks=2)
    assert cpu.flops > 1e8 and cpu.bandwidth > 1e8 and cpu.memory == host_memory() / 2
    assert named_like("NVIDIA A100-SXM4-40GB", 39.5 * 2**30) is GPUS["a100-40"]
    assert named_like("NVIDIA A100-SXM4-80GB", 79.3 * 2**30) is GPUS["a100-80"]
    assert named_like("NVIDIA H100 80GB HBM3", 80e9) is GPUS["h100"]
    assert named_like("NVIDIA GeForce RTX 4090", 24e9) is GPUS["4090"]
    assert named_like("NVIDIA T4", 16e9) is None
    with pytest.raises(ValueError, match=r"--gpu h101: unknown.*h100"):
        find_device("h101")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = main(list(argv))
    except SystemExit as error:
        code = int(error.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command(capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "qwen3-vl-8b", "--gpu", "h100", "--gpus", "8", "--json")
    plan: dict[str, Any] = json.loads(out)
    assert code == 0 and plan["fits"]
    assert plan["parameters"]["total"] == 8_767_123_696
    assert sum(plan["memory_bytes"].values()) >= plan["memory_peak_bytes"]["train"] > 0
    assert plan["kv_tokens"] > 0 and plan["sequences"] > 0
    assert plan["step_s"]["step"] == pytest.approx(sum(v for k, v in plan["step_s"].items() if k != "step"))
    code, out, _ = run(capsys, "qwen3-vl-8b", "--gpu", "4090", "--gpus", "1")
    assert code == 1 and "does not fit" in out
    code, out, _ = run(capsys, "qwen3-vl-8b-sft", "--gpus", "8")
    assert code == 0 and "engine weights" not in out
    for argv, said in (
        (["qwen3-vl-9b"], ["qwen3-vl-9b", "qwen3-vl-8b"]),
        (["--gpu", "h101"], ["h101", "h100"]),
        (["--algo.group_sise", "3"], ["algo.group_sise", "algo.group_size"]),
        (["--gpus", "0"], ["--gpus 0: must be 1 or more"]),
        (["--nodes", "-1"], ["--nodes -1: must be 1 or more"]),
        (["--prompt-tokens", "-5"], ["--prompt-tokens -5: must be a finite number from 0 on"]),
        (["--sampled-tokens", "nan"], ["--sampled-tokens nan: must be a finite number"]),
        (["--observed-tokens", "inf"], ["--observed-tokens inf: must be a finite number"]),
        (["--image-share", "2"], ["--image-share 2: must be between 0 and 1"]),
    ):
        code, _, err = run(capsys, *argv)
        assert code == 2 and all(word in err for word in said), err


def test_it_starts_without_torch():
    code = "import sys; from axpo.plan.__main__ import main; main(['qwen3-vl-2b']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path.cwd())
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_shapes_need_every_size():
    with pytest.raises(KeyError, match="hidden_size"):
        read_shape({"vocab_size": 8, "num_attention_heads": 2})
    assert isinstance(read_shape(published_config("2b") or {}), Shape)

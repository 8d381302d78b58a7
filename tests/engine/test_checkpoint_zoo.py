"""Checkpoints of unusual shapes and forms: transformers' logits and greedy tokens on every CPU path of the engine."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import LLM, SamplingParams
from tests.engine.checkpoints import Settings, write_text_checkpoint, write_vl_checkpoint
from tests.engine.reference import assert_greedy, load_reference, prefill_logits, random_prompt, reference_logits

ENGINES = (("ours", 16), ("ours", 8), ("sdpa", 16))  # packed steps take blocks of 16 tokens, so the second is unpacked
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def rope(section: list[int], theta: float = 10000.0) -> Settings:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": section}}


def edit_config(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = path / "config.json"
    raw = json.loads(file.read_text())
    edit(raw)
    file.write_text(json.dumps(raw))


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = path / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def check(path: Path, most_images: int, packed: bool = True) -> None:
    """packed: whether the sizes are those that packed steps take."""
    seed = random.randrange(2**31)
    reference = load_reference(path)
    for attention, block_size in ENGINES:
        where = f"{attention}, blocks of {block_size}, seed {seed}"
        llm = LLM(path, attention=attention, block_size=block_size, kv_cache_bytes=1 << 24)
        assert (llm.runner.packed is not None) == (packed and attention == "ours" and block_size == 16), where
        rng = random.Random(seed)
        for images in range(most_images + 1):
            tokens, pictures = random_prompt(rng, llm, images)
            prompt = {"prompt_token_ids": tokens, "multi_modal_data": {"image": pictures}}
            new = llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
            expected = reference_logits(reference, tokens + new, pictures)
            error = (prefill_logits(llm, tokens + new, pictures) - expected).norm() / expected.norm()
            assert error < 1e-4, f"{images} images: relative error {error} ({where})"
            assert_greedy(llm, reference, tokens, pictures, new)


# name: settings, whether the sizes are packed ones
TEXT: dict[str, tuple[Settings, bool]] = {
    "heads 3:1": ({"num_attention_heads": 3, "num_key_value_heads": 1}, True),
    "heads 8:1": ({"num_attention_heads": 8, "num_key_value_heads": 1}, True),
    "heads 4:4": ({"num_attention_heads": 4, "num_key_value_heads": 4}, True),
    "heads 9:3": ({"num_attention_heads": 9, "num_key_value_heads": 3}, True),
    "heads 7:7": ({"num_attention_heads": 7, "num_key_value_heads": 7}, True),
    "head_dim 8": ({"head_dim": 8}, False),
    "head_dim 24": ({"head_dim": 24}, False),
    "head_dim 40": ({"head_dim": 40}, False),
    "head_dim 80": ({"head_dim": 80}, True),
    "head_dim 96": ({"head_dim": 96}, True),
    "head_dim 128": ({"head_dim": 128}, True),
    "head_dim 256": ({"head_dim": 256}, True),
    "hidden 47": ({"hidden_size": 47}, False),
    "hidden 1": ({"hidden_size": 1, "intermediate_size": 1}, False),
    "hidden 16": ({"hidden_size": 16, "intermediate_size": 16}, True),
    "intermediate 71": ({"hidden_size": 64, "intermediate_size": 71}, False),
    "vocabulary 264, one more than the tokenizer": ({"vocab_size": 264, "tie_word_embeddings": True}, True),
    "vocabulary 262, one less": ({"vocab_size": 262}, True),
    "vocabulary 1001": ({"vocab_size": 1001}, True),
    "one layer": ({"num_hidden_layers": 1}, True),
    "biases": ({"attention_bias": True, "tie_word_embeddings": True}, False),
    "eps": ({"rms_norm_eps": 1e-3}, True),
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}, True),
}


@pytest.mark.parametrize("name", TEXT)
def test_text(name: str, tmp_path: Path) -> None:
    settings, packed = TEXT[name]
    check(write_text_checkpoint(tmp_path, tie=False, seed=1, text=settings), 0, packed)


# name: settings of the text and of the vision model, whether the text's sizes and the tower's are packed ones
VISION: dict[str, tuple[Settings, Settings, bool, bool]] = {
    "no deepstack": ({}, {"deepstack_visual_indexes": []}, True, True),
    "deepstack of the first block": ({}, {"deepstack_visual_indexes": [0]}, True, True),
    "deepstack in another order": ({}, {"deepstack_visual_indexes": [2, 0]}, True, True),
    "deepstack in another order, unpacked": ({}, {"deepstack_visual_indexes": [2, 0], "hidden_size": 24}, True, False),
    "more levels than layers": ({"num_hidden_layers": 1}, {"deepstack_visual_indexes": [0, 1, 2]}, True, True),
    "all time": (rope([8, 0, 0]), {}, True, True),
    "no time": (rope([0, 4, 4]), {}, True, True),
    "more height": (rope([3, 3, 2], 77.0), {}, True, True),
    "sections beyond the head": (rope([6, 6, 6]), {}, True, True),
    "merge 1": ({}, {"spatial_merge_size": 1}, True, True),
    "merge 3, patches of 7": ({}, {"spatial_merge_size": 3, "patch_size": 7}, True, True),
    "one frame": ({}, {"temporal_patch_size": 1, "patch_size": 2}, True, True),
    "three frames": ({}, {"temporal_patch_size": 3}, True, True),
    "positions that are no square": ({}, {"num_position_embeddings": 35}, True, True),
    "one position, one block": (
        {},
        {"num_position_embeddings": 1, "depth": 1, "deepstack_visual_indexes": [0]},
        True,
        True,
    ),
    "tower of 40": ({}, {"hidden_size": 40, "intermediate_size": 50}, True, False),
    "tower heads of 4": ({}, {"num_heads": 8}, True, True),
    "biases": ({"attention_bias": True}, {}, False, True),
    "odd sizes": (
        {"hidden_size": 52, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24, **rope([6, 3, 3])},
        {"out_hidden_size": 52},
        False,
        True,
    ),
}


@pytest.mark.parametrize("name", VISION)
def test_vision(name: str, tmp_path: Path) -> None:
    text, vision, packed, packed_tower = VISION[name]
    path = write_vl_checkpoint(tmp_path, tie=len(text) > 0, seed=1, text=text, vision=vision)
    check(path, 2, packed)
    llm = LLM(path, kv_cache_bytes=1 << 22)
    assert (llm.runner.vision.packed is not None) == packed_tower


def published_rope(raw: dict[str, Any]) -> None:
    """As the published checkpoints have it, and those of transformers 4."""
    text = raw["text_config"]
    del text["rope_parameters"]
    text |= {"rope_scaling": {"rope_type": "default", "mrope_section": [3, 3, 2]}, "rope_theta": 7777}


def both_ropes(raw: dict[str, Any]) -> None:
    raw["text_config"]["rope_scaling"] = {"rope_type": "default", "mrope_section": [3, 3, 2], "rope_theta": 55.0}


FORMS: dict[str, Callable[[dict[str, Any]], object]] = {
    "rope_scaling and rope_theta": published_rope,
    "rope_scaling besides rope_parameters": both_ropes,
    "no mrope_section": lambda raw: raw["text_config"]["rope_parameters"].pop("mrope_section"),
    "rope_theta at both places": lambda raw: raw["text_config"].update(rope_theta=3.0),
    "the tower's own theta": lambda raw: raw["vision_config"].update(rope_parameters={"rope_theta": 77.0}),
    "only text_config is tied": lambda raw: raw["text_config"].update(tie_word_embeddings=True),
    "optional keys left out": lambda raw: (
        [raw["vision_config"].pop(key, None) for key in ("in_channels", "temporal_patch_size", "hidden_act")],
        [raw["text_config"].pop(key, None) for key in ("rms_norm_eps", "attention_bias", "hidden_act")],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_config_json(name: str, tmp_path: Path) -> None:
    path = write_vl_checkpoint(tmp_path, tie=False, seed=1)
    edit_config(path, FORMS[name])
    check(path, 1)


def test_null_is_one_key_value_head_a_query_head(tmp_path: Path) -> None:
    path = write_text_checkpoint(tmp_path, tie=False, seed=1, text={"num_key_value_heads": 4})
    edit_config(path, lambda raw: raw.update(num_key_value_heads=None))
    check(path, 0)


def test_a_head_that_is_tied_in_text_config_alone(tmp_path: Path) -> None:
    """transformers 5 would fill the missing head with noise; vLLM ties it, and so does what wrote it."""
    tied = write_vl_checkpoint(tmp_path / "tied", tie=True, seed=1)
    other = write_vl_checkpoint(tmp_path / "other", tie=True, seed=1)
    edit_config(
        other, lambda raw: (raw.pop("tie_word_embeddings"), raw["text_config"].update(tie_word_embeddings=True))
    )
    assert greedy(LLM(other, kv_cache_bytes=1 << 22)) == greedy(LLM(tied, kv_cache_bytes=1 << 22))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_stored_in_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    path = write_vl_checkpoint(tmp_path, tie=True, seed=1)
    edit_weights(path, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    check(path, 1)


def greedy(llm: LLM) -> list[int]:
    return llm.generate([[8, 9, 10]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def test_shards_links_and_spellings_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache is a folder of links into another; and a home directory may be written ~."""
    path = write_text_checkpoint(tmp_path / "one", tie=False, seed=1)
    expected = greedy(LLM(path, kv_cache_bytes=1 << 22))
    sharded = tmp_path / "sharded"
    load_reference(path).save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 5
    cache = tmp_path / "models--Some--Model"
    snapshot = cache / "snapshots" / "0123abcd"
    for folder in (cache / "blobs", snapshot):
        folder.mkdir(parents=True)
    files = [*sharded.iterdir(), *(path / name for name in ("tokenizer.json", "tokenizer_config.json"))]
    for number, file in enumerate(files):
        (cache / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    (snapshot / "model.safetensors").write_bytes(b"stale")  # the index counts
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelling in (snapshot, f"{snapshot}/", "~/models--Some--Model/snapshots/0123abcd"):
        assert greedy(LLM(spelling, kv_cache_bytes=1 << 22)) == expected
    with pytest.raises(FileNotFoundError, match=f"no config.json there; give '{snapshot}'"):
        LLM(cache)

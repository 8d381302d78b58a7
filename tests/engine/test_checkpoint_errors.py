"""Checkpoints that cannot be served and files that are missing: one error each, which names the file and the fix."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from engine import LLM, Processor, SamplingParams
from tests.engine.checkpoints import IMAGE
from tests.engine.reference import load_reference
from tests.engine.test_checkpoint_zoo import edit_config, edit_weights

IDS = SamplingParams(temperature=0, max_tokens=3, detokenize=False)
NORM, HEAD = "model.language_model.norm.weight", "lm_head.weight"


def llm_of(path: Path, **options: Any) -> LLM:
    return LLM(path, **{"kv_cache_bytes": 1 << 22, **options})


def linked(source: Path, target: Path, *without: str) -> Path:
    """The files of a checkpoint but some, and a config.json and weights of its own, to be edited."""
    target.mkdir()
    for file in source.iterdir():
        if file.name in ("config.json", "model.safetensors") and file.name not in without:
            (target / file.name).write_bytes(file.read_bytes())
        elif file.name not in without:
            (target / file.name).symlink_to(file)
    return target


def dropping(key: str) -> Callable[[dict[str, Any]], object]:
    *sections, last = key.split(".")

    def edit(raw: dict[str, Any]) -> None:
        for section in sections:
            raw = raw[section]
        del raw[last]

    return edit


def setting(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    *sections, last = key.split(".")

    def edit(raw: dict[str, Any]) -> None:
        for section in sections:
            raw = raw[section]
        raw[last] = value

    return edit


REQUIRED = (
    *(f"text_config.{key}" for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")),
    *(f"text_config.{key}" for key in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")),
    *(f"vision_config.{key}" for key in ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size")),
    *(f"vision_config.{key}" for key in ("out_hidden_size", "num_position_embeddings")),
)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str, vl_checkpoint: Path, tmp_path: Path) -> None:
    path = linked(vl_checkpoint, tmp_path / "model")
    edit_config(path, dropping(key))
    with pytest.raises(ValueError, match=rf"config.json: {key} is missing"):
        llm_of(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        *((setting("model_type", kind), f"model_type is '{kind}'; the engine serves") for kind in ("qwen2", "llama")),
        *((setting("model_type", kind), f"model_type is '{kind}'") for kind in ("qwen3_moe", "qwen3_vl_moe")),
        (dropping("model_type"), "model_type is 'None'"),
        (dropping("text_config"), "has no text_config"),
        (dropping("vision_config"), "has no vision_config"),
        (dropping("text_config.rope_parameters"), "text_config.rope_theta is missing"),
        (dropping("text_config.rope_parameters.rope_theta"), "text_config.rope_theta is missing"),
        (
            setting("text_config.rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
            "rope_type 'yarn' is not supported",
        ),
        (setting("quantization_config", {"quant_method": "fp8"}), "quantization_config is not supported"),
        (setting("text_config.layer_types", ["full_attention", "sliding_attention"]), "layer_types .* not supported"),
        (setting("text_config.num_attention_heads", "4"), "num_attention_heads is '4'; it must be a whole number"),
        (setting("text_config.num_hidden_layers", 0), "num_hidden_layers is 0; it must be"),
        (setting("text_config.num_key_value_heads", 3), "num_key_value_heads is 3; it must be a divisor .*, 4"),
        (setting("text_config.head_dim", 15), "head_dim is 15; it must be even"),
        (dropping("image_token_id"), "image_token_id is missing; it must be a token of the vocabulary of 320"),
        (setting("vision_config.deepstack_visual_indexes", [0, 7]), r"\[0, 7\]; it must be different .* the 3 blocks"),
        (setting("vision_config.deepstack_visual_indexes", [0, 0]), r"\[0, 0\]; it must be different"),
        (setting("vision_config.out_hidden_size", 52), "out_hidden_size is 52; it must be text_config's 48"),
        (setting("vision_config.in_channels", 1), "in_channels is 1; it must be 3"),
        (setting("vision_config.num_heads", 16), "hidden_size is 32; it must be a multiple of four times num_heads"),
        (setting("vision_config.patch_size", [4, 4]), r"patch_size is \[4, 4\]; it must be a whole number"),
        (setting("vision_config.hidden_act", "gelu"), "vision_config.hidden_act is not supported"),
    ],
)
def test_a_config_that_cannot_be_served(
    edit: Callable[[dict[str, Any]], object], message: str, vl_checkpoint: Path, tmp_path: Path
) -> None:
    path = linked(vl_checkpoint, tmp_path / "model")
    edit_config(path, edit)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        llm_of(path)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_config_that_is_none(text: str, vl_checkpoint: Path, tmp_path: Path) -> None:
    path = linked(vl_checkpoint, tmp_path / "model")
    (path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config.json: (not valid JSON|model_type is)"):
        llm_of(path)


def test_paths_that_are_no_checkpoint(vl_checkpoint: Path, tmp_path: Path) -> None:
    for path, message in (
        ("Qwen/Qwen3-0.6B", "must be fetched first: hf download Qwen/Qwen3-0.6B --local-dir"),
        ("~/nothing/here", "'~/nothing/here': no such directory; give a Hugging Face checkpoint directory"),
        (vl_checkpoint / "model.safetensors", f"this is a file; give the directory that holds it, '{vl_checkpoint}'"),
        (tmp_path, "no config.json there; give"),
    ):
        for opened in (LLM, Processor.from_pretrained):
            with pytest.raises(FileNotFoundError, match=message):
                opened(path)


def test_weights_that_do_not_fit(vl_checkpoint: Path, tmp_path: Path) -> None:
    def scaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, HEAD: 2 * tensors["model.language_model.embed_tokens.weight"]}

    for number, (edit, message) in enumerate(
        (
            (lambda t: {**t, "extra": torch.ones(2)}, r"0 missing, 1 unexpected \(extra\)"),
            (lambda t: {name: t[name] for name in t if name != NORM}, rf"1 missing \({NORM}\), 0 unexpected"),
            (lambda t: {**t, NORM: torch.ones(47)}, rf"{NORM} has shape \[47\], the config asks for \[48\]"),
            (lambda t: {**t, NORM: t[NORM].to(torch.int8)}, f"{NORM} is stored as I8; .* not quantized"),
            (lambda t: {**t, NORM: t[NORM].to(torch.float8_e4m3fn)}, f"{NORM} is stored as F8_E4M3"),
            (scaled, f"{HEAD} is stored and is not the embedding, but config.json says tie_word_embeddings = true"),
        )
    ):
        path = linked(vl_checkpoint, tmp_path / str(number))
        edit_weights(path, edit)
        with pytest.raises(ValueError, match=message):
            llm_of(path)
    path = linked(vl_checkpoint, tmp_path / "untied")
    edit_config(path, setting("tie_word_embeddings", False))
    with pytest.raises(
        ValueError, match=r"1 missing \(lm_head.weight\).* config.json must say tie_word_embeddings = true"
    ):
        llm_of(path)


def test_what_older_exports_have_besides(vl_checkpoint: Path, tmp_path: Path) -> None:
    """A tied head that is the embedding, and frequencies that config.json gives."""
    path = linked(vl_checkpoint, tmp_path / "model")
    frequencies = {"model.language_model.rotary_emb.inv_freq": torch.ones(8)}
    edit_weights(path, lambda t: {**t, HEAD: t["model.language_model.embed_tokens.weight"].clone(), **frequencies})
    prompt = [[8, 9]]
    outputs = [llm_of(one).generate(prompt, IDS, use_tqdm=False)[0].outputs[0] for one in (path, vl_checkpoint)]
    assert outputs[0].token_ids == outputs[1].token_ids and outputs[0].logprobs == outputs[1].logprobs


def test_shards_that_are_broken(vl_checkpoint: Path, tmp_path: Path) -> None:
    sharded = linked(vl_checkpoint, tmp_path / "sharded", "model.safetensors")
    load_reference(vl_checkpoint).save_pretrained(sharded, max_shard_size="30KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shard = index["weight_map"][NORM]
    for number, (text, message) in enumerate(
        (
            ("{", "index.json: not a safetensors index .* fetch it again"),
            ('{"weight_map": null}', "index.json: not a safetensors index"),
            (
                json.dumps(index).replace(shard, "gone.safetensors"),
                "gone.safetensors: named in .*index.json but missing",
            ),
        )
    ):
        path = linked(sharded, tmp_path / str(number), "model.safetensors.index.json")
        (path / "model.safetensors.index.json").write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            llm_of(path)
    whole = (sharded / shard).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"):
        path = linked(sharded, tmp_path / f"cut{len(content)}", shard)
        (path / shard).write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"{shard}: truncated or not a safetensors file .*; fetch the shard again"
        ):
            llm_of(path)
    path = linked(sharded, tmp_path / "dangling", shard)
    (path / shard).symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=f"{shard}: named in .* but missing"):
        llm_of(path)
    path = linked(vl_checkpoint, tmp_path / "other", "model.safetensors")
    (path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: missing; .* pytorch_model.bin is another format"):
        llm_of(path)


def test_without_a_tokenizer_token_ids_and_images_work(vl_checkpoint: Path, tmp_path: Path) -> None:
    path = linked(vl_checkpoint, tmp_path / "model", "tokenizer.json", "tokenizer_config.json")
    llm, whole = llm_of(path), llm_of(vl_checkpoint)
    prompts: list[Any] = [
        [8, 9],
        {"prompt_token_ids": [8, IMAGE], "multi_modal_data": {"image": Image.new("RGB", (16, 24))}},
    ]
    expected = [output.outputs[0].token_ids for output in whole.generate(prompts, IDS, use_tqdm=False)]
    assert [output.outputs[0].token_ids for output in llm.generate(prompts, IDS, use_tqdm=False)] == expected
    steps = llm.stats()["steps"]
    for prompt, params in (("text", IDS), ([8, 9], SamplingParams())):
        with pytest.raises(FileNotFoundError, match=r"no tokenizer.json.* give token ids and .*detokenize=False"):
            llm.generate(prompt, params, use_tqdm=False)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json"):
        llm.chat([{"role": "user", "content": "?"}])
    assert llm.stats()["steps"] == steps and not llm.sequences


def test_without_a_template_there_is_no_chat(vl_checkpoint: Path) -> None:
    llm = llm_of(vl_checkpoint)
    with pytest.raises(ValueError, match=r"no chat template.* give chat_template=, or write the prompt out"):
        llm.chat([{"role": "user", "content": "?"}])
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert llm.chat([{"role": "user", "content": "?"}], IDS, use_tqdm=False, chat_template=template)[0].prompt == "?"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "no preprocessor_config.json, which images need"),
        ({"patch_size": 8}, "json: patch_size is 8, but config.json's vision_config.patch_size is 4"),
        ({"merge_size": 1}, "json: merge_size is 1, but config.json's vision_config.spatial_merge_size is 2"),
        ({"temporal_patch_size": 1}, "json: temporal_patch_size is 1, but"),
        ("{", "preprocessor_config.json: cannot be read .*; fetch it again"),
    ],
)
def test_image_processors_that_are_none(change: Any, message: str, vl_checkpoint: Path, tmp_path: Path) -> None:
    name = "preprocessor_config.json"
    path = linked(vl_checkpoint, tmp_path / "model", name)
    if isinstance(change, dict):
        (path / name).write_text(json.dumps(json.loads((vl_checkpoint / name).read_text()) | change))
    elif change:
        (path / name).write_text(change)
    llm = llm_of(path)
    assert llm.generate([8, 9], IDS, use_tqdm=False)[0].outputs[0].token_ids, "text needs none"
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        llm.open({"prompt_token_ids": [8, IMAGE], "multi_modal_data": {"image": Image.new("RGB", (16, 24))}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"eos_token_id": [1, 8]}', {1, 8}),
        ('{"eos_token_id": 8}', {8}),
        ('{"eos_token_id": []}', set()),
        ("{}", {1}),  # then the tokenizer's
        (None, {1}),
    ],
)
def test_where_the_end_of_sequence_is_said(
    text: str | None, expected: set[int], vl_checkpoint: Path, tmp_path: Path
) -> None:
    path = linked(vl_checkpoint, tmp_path / "model", "generation_config.json")
    if text is not None:
        (path / "generation_config.json").write_text(text)
    assert llm_of(path).eos_token_ids == expected


@pytest.mark.parametrize("text", ["{", '{"eos_token_id": "1"}', '{"eos_token_id": 1.5}', "[]"])
def test_an_end_of_sequence_that_is_none(text: str, vl_checkpoint: Path, tmp_path: Path) -> None:
    path = linked(vl_checkpoint, tmp_path / "model", "generation_config.json")
    (path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config.json: "):
        llm_of(path)


def test_new_weights_that_are_none(vl_checkpoint: Path) -> None:
    llm, state = llm_of(vl_checkpoint), load_reference(vl_checkpoint).state_dict()
    expected = llm.generate([8, 9], IDS, use_tqdm=False)[0].outputs[0].token_ids
    for tensors, message in (
        ({NORM: torch.ones(48, dtype=torch.int32)}, f"{NORM} is torch.int32 on cpu; give torch tensors of floating"),
        ({NORM: torch.ones(48, dtype=torch.complex64)}, f"{NORM} is torch.complex64"),
        ({NORM: torch.ones(48, device="meta")}, "on meta"),
        ({NORM: [1.0] * 48}, f"{NORM} is list"),
        ({NORM: torch.ones(47)}, rf"{NORM}, of shape \[47\], must have shape \[48\]"),
        ({"nothing": torch.ones(48)}, r"nothing, of shape \[48\], is unknown"),
        ({HEAD: 2 * state[HEAD]}, f"{HEAD} is not the embedding, to which config.json ties it"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.update_weights(tensors)
    llm.update_weights({NORM: torch.full((48,), torch.nan)})
    with pytest.raises(ValueError, match="NaN"):
        llm.generate([8, 9], IDS, use_tqdm=False)
    llm.update_weights(state)  # with a tied head, as transformers gives it
    assert llm.generate([8, 9], IDS, use_tqdm=False)[0].outputs[0].token_ids == expected
    assert llm.stats()["blocks_used"] == 0

"""Every mistake is one clear message that names the thing, and nothing that is already there is touched."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from axpo.cli import resolve
from axpo.config import Config
from axpo.inputs import check_inputs
from axpo.paths import model_directory
from tests.e2e.runs import axpo


def config(**options: Any) -> Config:
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('__', '.')}", str(value))]
    return resolve(Config, arguments, recipe="mini")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_directory("mini"), tmp_path / "checkpoint"))


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    return [{"id": f"q{i}", "question": "Which colour?", "images": ["red.png"], "answer": "red"} for i in range(3)]


def jsonl(tmp_path: Path, rows: list[dict[str, Any]]) -> Config:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config(data__task="jsonl", data__path=file, eval__questions=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"algo.group_sise": 8}, ["algo.group_sise", "algo.group_size"]),
        ({"rollout.temperature": -1}, ["rollout.temperature", "-1"]),
        ({"algo.rank": "confidense"}, ["algo.rank", "confidense", "confidence"]),
        ({"model.path": "/nowhere"}, ["model.path", "/nowhere"]),
        ({"rollout.tools": "image_zoom"}, ["image_zoom"]),
    ],
)
def test_the_program_says_what_is_wrong_in_one_line_and_starts_nothing(
    tmp_path: Path, options: dict[str, Any], said: list[str]
) -> None:
    named = {key.replace(".", "__"): value for key, value in options.items()}
    done = axpo("train", run__dir=tmp_path / "runs", **named)
    assert done.returncode == 2, done.stderr
    message = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(message) == 1 and all(word in message[0] for word in said), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_an_existing_run_directory_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "mini-axpo" / "metrics.jsonl"
    kept.parent.mkdir()
    kept.write_text('{"step": 1}\n')
    done = axpo("train", run__dir=tmp_path)
    assert done.returncode == 2 and "--run.resume" in done.stderr and str(kept.parent) in done.stderr
    assert kept.read_text() == '{"step": 1}\n' and [*kept.parent.iterdir()] == [kept]


def test_weights_of_another_config_are_named_before_a_run_begins(checkpoint: Path) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    raw["text_config"]["hidden_size"] = raw["vision_config"]["out_hidden_size"] = 80
    (checkpoint / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight has shape \[\d+, 128\], the config asks for \[\d+, 80\]"
    ):
        check_inputs(config(model__path=checkpoint))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("tokenizer.json", "no tokenizer.json, which text needs; fetch it"),
        ("chat_template.jinja", "no chat template, neither chat_template.jinja"),
        ("preprocessor_config.json", "no preprocessor_config.json, which images need"),
    ],
)
def test_a_missing_file_is_named_before_a_run_begins(checkpoint: Path, file: str, said: str) -> None:
    (checkpoint / file).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        check_inputs(config(model__path=checkpoint))


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: missing"):
        check_inputs(config(model__path=checkpoint))
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors: named in .* but missing"):
        check_inputs(config(model__path=checkpoint))


@pytest.mark.parametrize("kept", [0.5, 0.001, 0.0])
def test_a_truncated_shard_is_named_before_anything_is_loaded(checkpoint: Path, kept: float) -> None:
    shard = checkpoint / "model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or not a safetensors file"):
        check_inputs(config(model__path=checkpoint))


def test_another_architecture_is_refused(checkpoint: Path) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**raw, "model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        check_inputs(config(model__path=checkpoint))


def test_good_rows_pass(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    assert check_inputs(jsonl(tmp_path, rows)).task.size("train") == 3


def test_a_row_without_an_answer_is_named(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    del rows[1]["answer"]
    with pytest.raises(ValueError, match=r"rows\.jsonl.*2.*answer"):
        check_inputs(jsonl(tmp_path, rows))


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    rows[2]["images"] = ["broken.png"]
    with pytest.raises(ValueError, match=r"rows\.jsonl.*3.*broken\.png"):
        check_inputs(jsonl(tmp_path, rows))


def test_more_tokens_than_the_context(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout\.max_tokens = 100000: the model's context is"):
        check_inputs(config(rollout__max_tokens=100000))


def test_more_questions_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"eval\.questions = 100000"):
        check_inputs(config(eval__questions=100000))

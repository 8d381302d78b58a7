"""Whole runs of recipes over recipe mini."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from axpo.paths import model_directory
from tests.e2e.runs import SMALL, axpo, metrics, trajectories

OPTIONS = {key.replace(".", "__"): value for key, value in SMALL.items()}


@pytest.mark.parametrize("recipe", ["arpo", "no-prefix-fix", "no-tool-target"])
def test_what_is_resampled_is_trained(tmp_path: Path, recipe: str) -> None:
    done = axpo("train", "mini", recipe, run__dir=tmp_path, run__steps=1, **OPTIONS)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / f"mini-{recipe}"
    (row,) = metrics(run)
    assert row["resample/continuations"] > 0 and row["policy/grad_norm"] > 0
    made = trajectories(run, 1)
    assert any(t.parent is not None and any(t.loss_mask) for t in made)
    assert "another way than AXPO" in (run / "report.html").read_text()


def test_no_reinforcement_learning_leaves_the_checkpoint_evaluated(tmp_path: Path) -> None:
    options = OPTIONS | {"eval__questions": 4, "eval__samples": 2}
    done = axpo("train", "mini", "no-rl", run__dir=tmp_path, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "mini-no-rl"
    assert [file.name for file in (run / "evaluation").iterdir()] == ["step_000000.json"]
    assert json.loads((run / "evaluation" / "step_000000.json").read_text())["summary"]["questions"] == 4
    assert metrics(run) == [] and (run / "report.html").is_file() and "without training" in done.stdout
    assert tomllib.loads((run / "config.toml").read_text())["run"]["steps"] == 0
    before, after = (
        load_file(next(folder.glob("*.safetensors"))) for folder in (model_directory("mini"), run / "policy")
    )
    assert all(torch.equal(before[name].float(), tensor.float()) for name, tensor in after.items() if name in before)
    assert before.keys() & after.keys()

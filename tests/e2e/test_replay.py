"""A run that meets NaN stops, keeps the update, and the replay finds where the first bad number comes from."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from axpo.paths import model_directory
from tests.e2e.runs import axpo, metrics, train

TINY = {"rollout__questions_per_step": 1, "rollout__max_new_tokens": 8, "algo__group_size": 2, "checkpoint__every": 1}
BAD = "model.language_model.layers.2.mlp.down_proj"


def test_a_damaged_reference_policy_stops_the_run_and_is_found(tmp_path: Path) -> None:
    """The policy of the checkpoint samples as ever; the reference, read again on the resume, has an infinite weight."""
    model = Path(shutil.copytree(model_directory("mini"), tmp_path / "model"))
    run = train(tmp_path, "run", 1, model__path=model, **TINY)
    state = load_file(model / "model.safetensors")
    state[f"{BAD}.weight"][3, 7] = float("inf")
    save_file(state, model / "model.safetensors")

    resumed = {"run__dir": tmp_path, "run__name": "run", "run__resume": "true", "eval__questions": 0}
    done = axpo("train", run__steps=3, model__path=model, optim__lr=1e-4, log__trees_in_report=2, **resumed, **TINY)
    assert done.returncode == 3, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("axpo.train: error: ")]
    assert len(errors) == 2 and "step 2, update 2: loss nan" in errors[0], done.stderr
    kept = run / "debug" / "step_000002"
    assert errors[1].endswith(f"python -m axpo.train --debug.replay {kept}"), errors
    assert [row["step"] for row in metrics(run)] == [1], "the step that failed is not in the metrics"

    found = axpo("train", debug__replay=kept)
    assert found.returncode == 3, found.stderr[-3000:]
    lines = found.stdout.splitlines()
    assert lines[0].startswith(f"replay of {kept}: update 2: loss nan"), found.stdout
    assert lines[-1].startswith(f"first non-finite tensor: forward, output of reference policy: {BAD}: "), found.stdout


def test_fine_tuning_from_damaged_weights_ends_with_the_same_code(tmp_path: Path) -> None:
    model = Path(shutil.copytree(model_directory("mini"), tmp_path / "model"))
    state = load_file(model / "model.safetensors")
    state[f"{BAD}.weight"][3, 7] = float("inf")
    save_file(state, model / "model.safetensors")
    small = {"run__steps": 1, "sft__batch_size": 2, "sft__examples": 8}
    done = axpo("sft", model__path=model, run__dir=tmp_path, run__name="tuned", **small)
    assert done.returncode == 3, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("axpo.sft: error: ")]
    assert len(errors) == 1 and "update 1: loss nan" in errors[0] and "Traceback" not in done.stderr, done.stderr

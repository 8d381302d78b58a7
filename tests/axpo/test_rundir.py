"""Run directories: never silently reused, resumed only with the same configuration, whole after a crash."""

import json
import random
import tomllib
from pathlib import Path

import pytest

from axpo.cli import resolve
from axpo.config import Config
from axpo.rundir import CHECKPOINT_STATE, RunDir, RunDirError, continue_from, open_run_dir, write_json, write_text
from axpo.trajectory import PROMPT, SAMPLED, Trajectory


def config(parent: Path, *argv: str) -> Config:
    return resolve(Config, [f"--run.dir={parent}", "--run.name=r", "--run.steps=9", *argv], recipe="mini")


def trajectory(step: int, rng: random.Random) -> Trajectory:
    n = rng.randint(3, 9)
    roles = [PROMPT, PROMPT] + [SAMPLED] * (n - 2)
    return Trajectory(
        step=step,
        question_id=f"q/{rng.random()}",
        group=0,
        id=f"{step}/0/{rng.randrange(8)}",
        parent=None,
        fork_token=None,
        prompt_len=2,
        tokens=[rng.randrange(99) for _ in range(n)],
        roles=roles,
        loss_mask=[int(role == SAMPLED) for role in roles],
        logprobs=[-rng.random() if role == SAMPLED else None for role in roles],
        entropies=[rng.random() if role == SAMPLED else None for role in roles],
        advantages=[0.0] * n,
        reward=1.0,
        status="answered",
        tool_calls=[],
        confidence=None,
        text="⟨é⟩\u2028 two\nlines",
    )


def started(tmp_path: Path, steps: int, checkpoints: list[int]) -> RunDir:
    """A run that was killed in step `steps` + 1, in the middle of writing its line of metrics."""
    run_dir = open_run_dir(config(tmp_path))
    for step in checkpoints:
        run_dir.checkpoint(step).mkdir(parents=True)
        (run_dir.checkpoint(step) / CHECKPOINT_STATE).write_text("{}")
    half_written = run_dir.checkpoint(steps + 1)
    half_written.with_name(f".tmp-{half_written.name}").mkdir()
    rng = random.Random(0)
    for step in range(1, steps + 1):
        run_dir.write_trajectories(step, [trajectory(step, rng)])
        write_json(run_dir.evaluation(step), {"step": step})
    lines = [json.dumps({"step": step, "reward/mean": step / 7}) for step in range(steps + 1)]
    run_dir.metrics.write_text("\n".join(lines) + '\n{"step": 1')
    return run_dir


def files(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


def test_a_new_run_directory_holds_its_resolved_configuration(tmp_path: Path):
    c = config(tmp_path / "parent", "--algo.rank", "entropy")
    run_dir = open_run_dir(c)
    assert run_dir.path == tmp_path / "parent" / "r" and run_dir.checkpoint_step == 0
    written = tomllib.loads(run_dir.config.read_text())
    assert written["algo"]["rank"] == "entropy" and set(written) == set(Config.model_fields)
    assert run_dir.trajectories(1).name == "step_000001.jsonl" and run_dir.trajectories(1).parent.is_dir()
    assert run_dir.checkpoint(10).name == "step_000010" and run_dir.checkpoint(10).parent.is_dir()


def test_an_existing_run_is_an_error_that_names_both_ways_out(tmp_path: Path):
    started(tmp_path, 3, [2])
    before = files(tmp_path)
    with pytest.raises(RunDirError, match=r"exists.*--run\.resume.*--run\.name \(now 'r'\)"):
        open_run_dir(config(tmp_path))
    assert files(tmp_path) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="is a file"):
        open_run_dir(config(tmp_path, "--run.name=file"))
    with pytest.raises(RunDirError, match=r"cannot be made.*set --run\.dir"):
        open_run_dir(config(tmp_path / "file"))
    assert files(tmp_path) == {**before, "file": ""}


def test_resume_needs_a_run(tmp_path: Path):
    with pytest.raises(RunDirError, match=r"no run to resume.*--run\.resume.*--run\.name \(now 'r'\)"):
        open_run_dir(config(tmp_path, "--run.resume"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("checkpoints", "kept"), [([2, 4], 4), ([3], 3), ([], 0)])
def test_resume_goes_back_to_the_last_complete_checkpoint(tmp_path: Path, checkpoints: list[int], kept: int):
    before = started(tmp_path, 5, checkpoints)
    untouched = {step: before.trajectories(step).read_bytes() for step in range(1, kept + 1)}
    run_dir = open_run_dir(config(tmp_path, "--run.resume", "--run.steps=12"))
    assert run_dir.checkpoint_step == kept and run_dir.checkpoint_steps() == checkpoints
    assert continue_from(run_dir.path) == run_dir, "other ranks agree"
    assert {step: run_dir.trajectories(step).read_bytes() for step in untouched} == untouched
    assert not any(run_dir.trajectories(step).exists() for step in range(kept + 1, 7))
    assert [run_dir.evaluation(step).exists() for step in range(1, 6)] == [step <= kept for step in range(1, 6)]
    steps = [json.loads(line)["step"] for line in run_dir.metrics.read_text().splitlines()]
    assert steps == (list(range(kept + 1)) if kept else []), "a run that starts over evaluates step 0 again"
    assert tomllib.loads(run_dir.config.read_text())["run"]["steps"] == 12


def test_a_resume_with_another_configuration_is_refused_field_by_field(tmp_path: Path):
    started(tmp_path, 3, [2])
    before = files(tmp_path)
    with pytest.raises(RunDirError) as error:
        open_run_dir(config(tmp_path, "--run.resume", "--algo.rank=entropy", "--optim.lr=0.5", "--log.console=false"))
    message = str(error.value)
    assert "algo.rank ('confidence' before, 'entropy' now)" in message and "optim.lr" in message
    assert "log.console" not in message and "config.toml can be given as the recipe" in message
    with pytest.raises(RunDirError, match=r"--run\.steps 8: the run has 9"):
        open_run_dir(config(tmp_path, "--run.resume", "--run.steps=8"))
    assert files(tmp_path) == before, "a refusal changes nothing"


def test_resume_allows_what_computes_nothing(tmp_path: Path):
    started(tmp_path, 3, [2])
    free = ["--checkpoint.every=3", "--log.trees_in_report=1", "--rollout.max_batch_tokens=77", "--run.steps=10"]
    assert open_run_dir(config(tmp_path, "--run.resume", *free)).checkpoint_step == 2


def test_the_written_configuration_resumes_the_run(tmp_path: Path):
    run_dir = open_run_dir(config(tmp_path, "--algo.rank=random", "--optim.lr=0.00123"))
    c = resolve(Config, [str(run_dir.config), "--run.resume"], recipe="mini")
    assert open_run_dir(c).path == run_dir.path


def test_only_rank_0_writes(tmp_path: Path):
    assert open_run_dir(config(tmp_path), rank=1).path == tmp_path / "r"
    assert not list(tmp_path.iterdir())


def test_trajectories_read_back(tmp_path: Path):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    written = [trajectory(3, rng) for _ in range(5)]
    run_dir = RunDir(tmp_path)
    run_dir.write_trajectories(3, written)
    lines = run_dir.trajectories(3).read_text().split("\n")
    assert lines.pop() == "" and [Trajectory.from_json(line) for line in lines] == written, f"seed {seed}"


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path: Path):
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": [1, None]})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})

    def dies():
        yield trajectory(1, random.Random(0))
        raise KeyboardInterrupt

    run_dir = RunDir(tmp_path / "new")
    with pytest.raises(KeyboardInterrupt):
        run_dir.write_trajectories(1, dies())
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": [1, None]}
    assert not run_dir.trajectories(1).exists()
    assert [p.name for p in path.parent.iterdir()] == ["file.json"], "no temporary file stays"

"""Run directories: never silently reused, resumed only with the same configuration, whole after a crash."""

import json
import os
import random
import resource
import shutil
import tomllib
from pathlib import Path

import pytest

from axpo.checkpoint_record import STATE, CheckpointError, Progress, Record
from axpo.cli import resolve
from axpo.config import Config
from axpo.resume import Identity
from axpo.rundir import RunDir, RunDirError, agent, open_run_dir, write_json, write_text
from axpo.trajectory import PROMPT, SAMPLED, Trajectory

DATA = {"task": "mini", "questions": 20000, "sha256": "0123456789abcdef" * 4}


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
    made = config(tmp_path)
    run_dir = open_run_dir(made, DATA)
    lines = [json.dumps({"step": step, "reward/mean": step / 7}) + "\n" for step in range(steps + 1)]
    for step in checkpoints:
        length = len("".join(lines[: step + 1]))
        write_checkpoint(run_dir.checkpoint(step), Progress(step, 4 * step, length), Identity.of(made, DATA))
    half_written = run_dir.checkpoint(steps + 1)
    half_written.with_name(f".tmp-{half_written.name}").mkdir()
    rng = random.Random(0)
    for step in range(1, steps + 1):
        run_dir.write_trajectories(step, [trajectory(step, rng)])
        write_json(run_dir.evaluation(step), {"step": step})
    run_dir.metrics.write_text("".join(lines) + '{"step": 1')
    return run_dir


def write_checkpoint(path: Path, progress: Progress, identity: Identity) -> None:
    """The files of a whole checkpoint, without tensors in them."""
    path.mkdir(parents=True)
    (path / "shard").write_bytes(b"x" * 100)
    record = Record(
        progress=progress, updates=progress.step, world_size=1, identity=identity, files={"shard": [100, 0]}
    )
    (path / STATE).write_text(record.to_json())


def files(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


def test_a_new_run_directory_holds_its_resolved_configuration(tmp_path: Path):
    c = config(tmp_path / "parent", "--algo.rank", "entropy")
    run_dir = open_run_dir(c, DATA)
    assert run_dir.path == tmp_path / "parent" / "r" and run_dir.checkpoint_step == 0
    written = tomllib.loads(run_dir.config.read_text())
    assert written["algo"]["rank"] == "entropy" and set(written) == set(Config.model_fields)
    assert run_dir.trajectories(1).name == "step_000001.jsonl" and run_dir.trajectories(1).parent.is_dir()
    assert run_dir.checkpoint(10).name == "step_000010" and run_dir.checkpoint(10).parent.is_dir()


def test_an_existing_run_is_an_error_that_names_both_ways_out(tmp_path: Path):
    started(tmp_path, 3, [2])
    before = files(tmp_path)
    with pytest.raises(RunDirError, match=r"exists.*--run\.resume.*--run\.name \(now 'r'\)"):
        open_run_dir(config(tmp_path), DATA)
    assert files(tmp_path) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="is a file"):
        open_run_dir(config(tmp_path, "--run.name=file"), DATA)
    with pytest.raises(RunDirError, match=r"cannot be made.*set --run\.dir"):
        open_run_dir(config(tmp_path / "file"), DATA)
    assert files(tmp_path) == {**before, "file": ""}


def test_resume_needs_a_run(tmp_path: Path):
    with pytest.raises(RunDirError, match=r"no run to resume.*--run\.resume.*--run\.name \(now 'r'\)"):
        open_run_dir(config(tmp_path, "--run.resume"), DATA)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("checkpoints", "kept"), [([2, 4], 4), ([3], 3), ([], 0)])
def test_resume_goes_back_to_the_last_complete_checkpoint(tmp_path: Path, checkpoints: list[int], kept: int):
    before = started(tmp_path, 5, checkpoints)
    untouched = {step: before.trajectories(step).read_bytes() for step in range(1, kept + 1)}
    run_dir = open_run_dir(config(tmp_path, "--run.resume", "--run.steps=12"), DATA)
    assert run_dir.checkpoint_step == kept
    assert {step: run_dir.trajectories(step).read_bytes() for step in untouched} == untouched
    assert not any(run_dir.trajectories(step).exists() for step in range(kept + 1, 7))
    assert [run_dir.evaluation(step).exists() for step in range(1, 6)] == [step <= kept for step in range(1, 6)]
    steps = [json.loads(line)["step"] for line in run_dir.metrics.read_text().splitlines()]
    assert steps == (list(range(kept + 1)) if kept else []), "a run that starts over evaluates step 0 again"
    assert tomllib.loads(run_dir.config.read_text())["run"]["steps"] == 12


def test_a_resume_with_other_settings_is_refused_field_by_field(tmp_path: Path):
    started(tmp_path, 3, [2])
    before = files(tmp_path)
    with pytest.raises(RunDirError) as error:
        open_run_dir(
            config(tmp_path, "--run.resume", "--algo.rank=entropy", "--run.seed=1", "--log.console=false"), DATA
        )
    message = str(error.value).splitlines()
    assert "config.toml can be given as the recipe" in message[0] and "--run.name" in message[0]
    assert message[1].startswith("algo.rank: 'confidence' before, 'entropy' now; the steps behind the checkpoint would")
    assert message[2] == "run.seed: 0 before, 1 now; the order of the data and every sampled token follow from it"
    assert len(message) == 3, "log.console may change"
    with pytest.raises(RunDirError, match=r"--run\.steps 8: the run has 9"):
        open_run_dir(config(tmp_path, "--run.resume", "--run.steps=8"), DATA)
    assert files(tmp_path) == before, "a refusal changes nothing"


def test_an_edited_config_toml_does_not_pass_for_the_checkpoints(tmp_path: Path):
    run_dir = started(tmp_path, 3, [2])
    run_dir.config.write_text(run_dir.config.read_text().replace('rank = "confidence"', 'rank = "entropy"'))
    edited = resolve(Config, [str(run_dir.config), "--run.resume"], recipe="mini")
    with pytest.raises(RunDirError, match=r"algo\.rank: 'confidence' before, 'entropy' now"):
        open_run_dir(edited, DATA)


def test_a_resume_on_other_data_is_refused(tmp_path: Path):
    started(tmp_path, 3, [2])
    before = files(tmp_path)
    changed = DATA | {"questions": 19999, "sha256": "f" * 64}
    expected = (
        "20000 questions, content 0123456789ab… before, task mini, 19999 questions, content ffffffffffff… now; the"
    )
    with pytest.raises(RunDirError, match=expected):
        open_run_dir(config(tmp_path, "--run.resume"), changed)
    assert files(tmp_path) == before
    shutil.rmtree(tmp_path / "r/checkpoints/step_000002")
    assert open_run_dir(config(tmp_path, "--run.resume"), changed).checkpoint_step == 0, (
        "nothing was computed on it yet"
    )


def test_resume_allows_what_computes_nothing(tmp_path: Path):
    started(tmp_path, 3, [2])
    free = ["--checkpoint.every=3", "--log.trees_in_report=1", "--rollout.max_batch_tokens=77", "--run.steps=10"]
    free += ["--run.time_limit=1:30:00", "--run.timeout_s=60", "--checkpoint.asynchronous=false"]
    assert open_run_dir(config(tmp_path, "--run.resume", *free), DATA).checkpoint_step == 2


@pytest.mark.parametrize("damage", ["truncated", "missing", "corrupt"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]):
    run_dir = started(tmp_path, 5, [2, 4])
    shard, state = run_dir.checkpoint(4) / "shard", run_dir.checkpoint(4) / STATE
    if damage == "truncated":
        shard.write_bytes(b"x" * 50)
    elif damage == "missing":
        shard.unlink()
    else:
        state.write_text(state.read_text()[:-20])
    resumed = open_run_dir(config(tmp_path, "--run.resume"), DATA)
    assert resumed.checkpoint_step == 2
    said = capsys.readouterr().err
    name = STATE if damage == "corrupt" else "shard"
    assert f"step_000004/{name}: {damage}" in said and "continuing from step 2" in said
    assert [json.loads(line)["step"] for line in run_dir.metrics.read_text().splitlines()] == [0, 1, 2]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path: Path):
    run_dir = started(tmp_path, 5, [2, 4])
    for step in (2, 4):
        (run_dir.checkpoint(step) / "shard").unlink()
    before = files(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .*checkpoints is whole: .*step_000004/shard: missing; .*"
    ):
        open_run_dir(config(tmp_path, "--run.resume"), DATA)
    assert files(tmp_path) == before


def test_a_restart_by_torchrun_resumes_what_its_own_launch_began(tmp_path: Path):
    run_dir = started(tmp_path, 3, [2])
    with pytest.raises(RunDirError, match=r"exists.*--run\.resume"):
        open_run_dir(config(tmp_path), DATA, ["node-a/7/100"])
    assert open_run_dir(config(tmp_path, "--run.resume"), DATA, ["node-a/7/100", "node-b/9/101"]).checkpoint_step == 2
    assert open_run_dir(config(tmp_path), DATA, ["node-b/9/101"]).checkpoint_step == 2, "rank 0 may move to node b"
    with pytest.raises(RunDirError, match=r"exists.*--run\.resume"):
        open_run_dir(config(tmp_path), DATA, ["node-b/9/555"])  # another launch, whose agent happens to have the pid
    with pytest.raises(RunDirError, match=r"exists.*--run\.resume"):
        open_run_dir(config(tmp_path), DATA)
    assert run_dir.config.exists()


def test_the_agent_is_torchruns_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert agent() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert agent() == agent() and f"/{os.getppid()}/" in (agent() or "")


def test_the_written_configuration_resumes_the_run(tmp_path: Path):
    run_dir = open_run_dir(config(tmp_path, "--algo.rank=random", "--optim.lr=0.00123"), DATA)
    c = resolve(Config, [str(run_dir.config), "--run.resume"], recipe="mini")
    assert open_run_dir(c, DATA).path == run_dir.path


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


def test_a_file_system_that_refuses_is_an_error_with_a_way_on(tmp_path: Path):
    path = tmp_path / "file.json"
    write_json(path, [1])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunDirError, match=r"file\.json could not be written: .*File too large.*--run\.resume"):
            write_json(path, ["x" * 2000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert json.loads(path.read_text()) == [1] and [p.name for p in tmp_path.iterdir()] == ["file.json"]

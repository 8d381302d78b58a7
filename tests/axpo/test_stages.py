"""What the pipeline's stages are told, and when a finished one counts."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from axpo.cli import ConfigError, resolve
from axpo.config import PipelineConfig, Stages
from axpo.pipeline import evaluations, stages
from axpo.snapshot import snapshot
from axpo.stages import Record, Stage, locked


def config(tmp_path: Path, **options: Any) -> Stages:
    return Stages(dir=str(tmp_path), name="p", **options)


def told(stage: Stage) -> dict[str, str]:
    """The options of a stage by name."""
    return {name.removeprefix("--"): value for name, value in zip(stage.words, stage.words[1:], strict=False)}


def test_the_stages_are_the_papers_in_its_order(tmp_path: Path):
    made = {
        stage.name: stage
        for stage in stages(config(tmp_path, teacher="T", base="B", count=9, rl=["grpo=mini-grpo", "axpo=mini"]))
    }
    evaluated = ["teacher", "base", "sft", "sft+grpo", "sft+axpo"]
    order = ["questions", "teacher", "sft", "student", "filter", "grpo", "axpo"]
    assert list(made) == [*order, *(f"evaluate-{name}" for name in evaluated)]
    assert list(evaluations(config(tmp_path, rl=["grpo=mini-grpo", "axpo=mini"]))) == evaluated
    out = tmp_path / "p"
    questions = str(out / "questions.parquet")
    assert made["questions"].words == ["export", "mini", questions, "--count", "9"]
    for name in ("teacher", "student"):
        assert told(made[name])["data.path"] == questions and told(made[name])["data.task"] == "jsonl"
    assert (told(made["teacher"])["model.path"], told(made["sft"])["model.path"]) == ("T", "B")
    assert told(made["sft"])["data.path"] == str(out / "teacher" / "rows")
    policy = str(out / "sft" / "policy")
    for name in ("student", "grpo", "axpo", "evaluate-sft"):
        assert told(made[name])["model.path"] == policy
    assert told(made["student"])["collect.rows"] == "false"
    assert [*made["filter"].words[-2:]] == [questions, str(out / "rl.parquet")]
    for name in ("grpo", "axpo"):
        assert told(made[name])["data.path"] == str(out / "rl.parquet") and told(made[name])["run.name"] == name
        assert told(made[f"evaluate-sft+{name}"])["model.path"] == str(out / name / "policy")
        settings = made[name].settings()
        assert settings["algo"]["name"] == name and settings["eval"]["questions"] == 0


def test_rows_are_used_as_they_are_and_more_can_be_added(tmp_path: Path):
    options = {"questions": "q.parquet", "heldout": "h.parquet", "more": ["m.parquet", "n.jsonl"]}
    made = {stage.name: stage for stage in stages(config(tmp_path, **options))}
    assert "questions" not in made and told(made["teacher"])["data.path"] == "q.parquet"
    assert made["filter"].words[-6:] == [
        "q.parquet",
        str(tmp_path / "p/rl.parquet"),
        *["--add", "m.parquet", "--add", "n.jsonl"],
    ]
    assert told(made["axpo"])["data.heldout_path"] == "h.parquet" and "eval.questions" not in told(made["axpo"])
    made = {stage.name: stage for stage in stages(config(tmp_path, heldout="mini"))}
    assert made["heldout"].words == ["export", "mini", str(tmp_path / "p/heldout.parquet"), "--split", "heldout"]
    assert "heldout" in made["axpo"].needs


def test_ranks_and_resuming(tmp_path: Path):
    made = {stage.name: stage for stage in stages(config(tmp_path))}
    assert "torch.distributed.run" not in made["sft"].command(1) and "--run.resume" not in made["sft"].command(1)
    assert made["axpo"].command(8)[2:6] == ["torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
    assert "torch.distributed.run" not in made["filter"].command(8)
    (tmp_path / "p/sft").mkdir(parents=True)
    (tmp_path / "p/sft/config.toml").touch()
    assert made["sft"].command(1)[-1] == "--run.resume" and "--run.resume" not in made["axpo"].command(1)


def test_mistakes_are_found_before_the_first_stage(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"pipeline\.sft = .*: the pipeline sets model\.path itself"):
        stages(config(tmp_path, sft="mini-sft --model.path=x"))
    with pytest.raises(ConfigError, match=r"stage axpo: .*run\.step.*did you mean run\.steps"):
        Record(tmp_path, stages(config(tmp_path, rl=["axpo=mini --run.step 3"])))
    for entry, why in (
        ("axpo", "must be NAME=recipe"),
        ("sft=mini", "the name 'sft' is taken"),
        ("a/b=mini", "must be"),
    ):
        with pytest.raises(ConfigError, match=rf"pipeline\.rl = '{entry}': {why}"):
            resolve(PipelineConfig, [f"--pipeline.rl={entry}"], recipe="pipeline")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    message = r"/file/p cannot be made: Not a directory; set pipeline\.dir"
    with pytest.raises(ValueError, match=message), locked(tmp_path / "file" / "p"):
        pass


def test_some_checkpoints_are_evaluated(tmp_path: Path):
    some = config(tmp_path, evaluated=["sft+axpo", "base"])
    assert [stage.name for stage in stages(some)[-2:]] == ["evaluate-base", "evaluate-sft+axpo"]
    assert list(evaluations(some)) == ["base", "sft+axpo"]
    with pytest.raises(ConfigError, match=r"pipeline\.evaluated = 'axpo': there is teacher, base, sft, sft\+axpo"):
        resolve(PipelineConfig, ["--pipeline.evaluated=axpo", "--pipeline.rl=axpo=mini"], recipe="pipeline")


def test_a_finished_stage_counts_with_the_same_settings_only(tmp_path: Path):
    planned = stages(config(tmp_path, count=4))
    record = Record(tmp_path / "done", planned)
    for stage in planned[:3]:
        record.finish(stage, 1.0, {})
    assert list(Record(tmp_path / "done", planned).finished) == ["questions", "teacher", "sft"]
    # What is not finished may change, and what no result depends on.
    other = config(tmp_path, count=4, nproc=2, rl=[], sft="mini-sft --checkpoint.every 7 --log.console false")
    assert len(Record(tmp_path / "done", stages(other)).finished) == 3
    changed = stages(config(tmp_path, count=4, sft="mini-sft --optim.lr 0.5"))
    with pytest.raises(ValueError, match=r"stage sft was run with optim\.lr = 0\.0003, now 0\.5; .*--pipeline\.name"):
        Record(tmp_path / "done", changed)
    with pytest.raises(ValueError, match=r"stage questions was run with words = .*'4'.*, now .*'5'"):
        Record(tmp_path / "done", stages(config(tmp_path, count=5)))
    Record(tmp_path / "done", planned).finish(planned[1], 1.0, {})
    with pytest.raises(ValueError, match="stage sft was run with the results of another teacher"):
        Record(tmp_path / "done", planned)


def test_a_finished_stage_counts_while_what_it_read_is_as_it_was(tmp_path: Path):
    model, rows, more, bench = (tmp_path / name for name in ("model", "rows", "more.jsonl", "b.jsonl"))
    model.mkdir()
    rows.mkdir()
    for file in (model / "config.json", rows / "a.jsonl", more, bench):
        file.write_text("one")
    weights = model / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(1 << 30)
    evaluate = f"mini --eval.benchmarks mini,family/b={bench}"
    given = {"teacher": str(model), "base": str(model), "questions": str(rows), "more": [str(more)]}
    planned = stages(config(tmp_path, evaluate=evaluate, evaluated=["base"], **given))
    by_name = {stage.name: stage for stage in planned}
    assert by_name["teacher"].reads() == [model, rows]
    assert by_name["filter"].reads() == [rows, more], "what the stages before make is not there yet"
    assert by_name["evaluate-base"].reads() == [model, bench]
    assert stages(config(tmp_path, count=4))[0].reads() == [], "an embedded task is no file"

    record = Record(tmp_path / "done", planned)
    for stage in planned:
        record.finish(stage, 1.0, snapshot(stage.reads()))
    os.utime(rows / "a.jsonl")
    assert len(Record(tmp_path / "done", planned).finished) == len(planned), "of a small file the content counts"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=rf"{message}; name another folder with --pipeline\.name, or delete"):
            Record(tmp_path / "done", planned)

    for file, stage in ((rows / "a.jsonl", "teacher"), (more, "filter"), (bench, "evaluate-base")):
        file.write_text("two")
        refused(rf"stage {stage} has read .*: {file} was 3 bytes with SHA-256 \w+…, now it is 3 bytes with .*…")
        file.write_text("one")
    (rows / "b.jsonl").write_text("more")
    refused(rf"stage teacher .*: {rows / 'b.jsonl'} was not there, now it is 4 bytes .*")
    (rows / "b.jsonl").unlink()
    os.utime(weights)
    refused(rf"stage teacher .*: {weights} was {1 << 30} bytes of .*, now it is {1 << 30} bytes of .*")
    shutil.rmtree(model)
    assert len(Record(tmp_path / "done", planned).finished) == len(planned), "what was read may be cleared away"


SAVING = """
import signal, sys, time
def save(*_):
    time.sleep(1.0)
    open(sys.argv[1], "w").write("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import sys
from pathlib import Path
from axpo.stages import Runner, locked
with locked(Path(sys.argv[1])) as lock:
    runner = Runner(lock)
    code = runner.run([sys.executable, "-c", sys.argv[2], sys.argv[3]])
    print(code, runner.stopped.name, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stage_saves_when_the_pipeline_ends_and_the_folder_is_locked_until_then(tmp_path: Path, number: int):
    command = [sys.executable, "-c", PARENT, str(tmp_path / "p"), SAVING, str(tmp_path / "saved")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    parent.send_signal(number)
    if number == signal.SIGKILL:
        parent.wait()
        assert not (tmp_path / "saved").exists(), "it still saves"
        with locked(tmp_path / "p"):
            assert (tmp_path / "saved").read_text() == "saved"
    else:
        assert parent.stdout.readline() == f"0 {signal.Signals(number).name}\n" and parent.wait() == 0
        assert (tmp_path / "saved").read_text() == "saved"

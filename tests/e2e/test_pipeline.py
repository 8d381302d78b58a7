"""The pipeline on a few questions: killed in the middle of a stage it goes on, and a stage that fails stops it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from axpo.data import Rows
from tests.e2e.runs import ROOT, axpo, metrics

SAMPLING = "--rollout.max_new_tokens 64"
KEPT = "--checkpoint.every 1 --log.tensorboard false"
FIELDS = {
    "pipeline.name": "tiny",
    "pipeline.teacher": "mini",
    "pipeline.base": "mini",
    "pipeline.questions": "mini",
    "pipeline.count": 8,
    "pipeline.collect": f"mini --collect.batch_size 4 --collect.samples 4 {SAMPLING}",
    "pipeline.sft": f"mini-sft --run.steps 2 --sft.batch_size 4 {KEPT}",
    "pipeline.rl": f"axpo=mini --run.steps 4 --rollout.questions_per_step 2 --algo.group_size 4 {SAMPLING} {KEPT}",
    "pipeline.evaluated": "sft,sft+axpo",
    "pipeline.evaluate": f"mini --eval.benchmarks mini --eval.limit 3 --eval.samples 2 {SAMPLING}",
}
WORDS = [part for name, value in FIELDS.items() for part in (f"--{name}", str(value))]


def test_killed_it_goes_on_and_ends_with_the_table(tmp_path: Path):
    words = [*WORDS, "--pipeline.dir", str(tmp_path)]
    command = [sys.executable, "-m", "axpo.pipeline", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    out = tmp_path / "tiny"
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
        until = time.monotonic() + 400
        while not (out / "axpo" / "checkpoints" / "step_000001").exists():
            assert first.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
    kept = {file: file.stat().st_mtime_ns for name in ("teacher", "sft") for file in (out / name).rglob("*.*")}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("finished before") == 5 and "--run.resume" in done.stdout
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "finished stages must be left alone"
    assert [row["step"] for row in metrics(out / "axpo")] == [1, 2, 3, 4]
    ids = {row.id for row in Rows(out / "questions.parquet")}
    left = {row.id for row in Rows(out / "rl.parquet")}
    assert len(ids) == 8 and left and left < ids
    trained = {
        json.loads(line)["question_id"] for file in (out / "axpo/trajectories").iterdir() for line in file.open()
    }
    assert trained <= left, "RL sees only what the filter left"
    for name in ("sft", "sft+axpo"):
        assert f"│ {name} " in done.stdout and len((out / "evaluated" / name / "mini.jsonl").open().readlines()) == 6
    record = json.loads((out / "comparison/comparison.json").read_text())
    assert list(record["models"]) == ["sft", "sft+axpo"]
    again = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and again.stdout.count("finished before") == 8, again.stderr[-3000:]
    other = axpo("pipeline", *words, "--pipeline.count", "9")
    assert other.returncode == 2 and "stage questions was run with words" in other.stderr
    with (out / "questions.parquet").open("ab") as file:
        file.write(b"changed")
    changed = axpo("pipeline", *words)
    assert changed.returncode == 2 and "stage teacher has read what has changed since: " in changed.stderr


def test_a_stage_that_fails_stops_it_with_its_message(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    done = axpo("pipeline", *WORDS, "--pipeline.dir", str(tmp_path), "--pipeline.teacher", str(tmp_path / "empty"))
    assert done.returncode == 1
    assert "axpo.collect: error: " in done.stderr and "stage teacher ended with 2" in done.stderr
    assert [file.name for file in (tmp_path / "tiny/stages").iterdir()] == ["questions.json"]


def test_what_the_last_stage_lacks_stops_it_before_the_first(tmp_path: Path):
    words = [*WORDS, "--pipeline.dir", str(tmp_path)]
    done = axpo("pipeline", *words, "--pipeline.evaluate", "mini --eval.benchmarks gone.parquet")
    assert done.returncode == 2 and "eval.benchmarks = 'gone.parquet': no such file" in done.stderr
    assert not (tmp_path / "tiny/questions.parquet").exists()

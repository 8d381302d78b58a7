"""What a job asks before it starts, and how it is asked to end: time limits, identity, the data's fingerprint."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from axpo.cli import ConfigError, resolve
from axpo.config import Config
from axpo.heartbeat import Heartbeat, TracedSpans, Whereabouts
from axpo.resume import Identity
from axpo.stopping import Stop
from axpo.tasks import fingerprint, get_task


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("text", "seconds"), [("", None), ("90", 5400), ("0:00:07", 7), ("26:03:01", 93781)])
def test_time_limits(text: str, seconds: float | None, tmp_path: Path):
    assert resolve(Config, [f"--run.time_limit={text}"], recipe="mini").run.time_limit_s == seconds
    if text == "90":
        (tmp_path / "recipe.toml").write_text("[run]\ntime_limit = 90\n")
        assert resolve(Config, [str(tmp_path / "recipe.toml")], recipe="mini").run.time_limit_s == seconds


@pytest.mark.parametrize("text", ["1h", "-5", "1:60:00", "00:30", "1.5", "true"])
def test_what_is_no_time_limit_is_named(text: str):
    with pytest.raises(ConfigError, match=r"run\.time_limit = .*"):
        resolve(Config, [f"--run.time_limit={text}"], recipe="mini")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered(number: signal.Signals):
    stop = Stop()
    assert not stop.requested()
    os.kill(os.getpid(), number)
    assert stop.requested() and stop.reason == number.name


def test_the_time_limit_passes():
    stop = Stop(time_limit_s=0.05)
    while not stop.requested():
        time.sleep(0.01)
    assert stop.reason == "run.time_limit"
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "SIGTERM"
    assert not Stop(time_limit_s=3600).requested()


def rows(folder: Path, answers: list[str], shades: list[int]) -> Path:
    folder.mkdir()
    for index, shade in enumerate(shades):
        Image.new("RGB", (30, 30), (shade, 0, 0)).save(folder / f"{index}.png")
    lines = [{"id": f"q{i}", "question": "?", "images": [f"{i}.png"], "answer": a} for i, a in enumerate(answers)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


def test_the_fingerprint_is_of_the_content(tmp_path: Path):
    def of(file: Path) -> dict:
        return fingerprint(get_task("jsonl", path=file))

    one = of(rows(tmp_path / "a", ["1", "2"], [10, 20]))
    assert one == of(rows(tmp_path / "b", ["1", "2"], [10, 20])), "the place does not matter"
    assert (one["task"], one["questions"]) == ("jsonl", 2)
    others = [
        of(rows(tmp_path / "answer", ["1", "3"], [10, 20])),
        of(rows(tmp_path / "order", ["2", "1"], [20, 10])),
        of(rows(tmp_path / "image", ["1", "2"], [10, 21])),
        of(rows(tmp_path / "fewer", ["1"], [10])),
    ]
    hashes = {data["sha256"] for data in [one, *others]}
    assert len(hashes) == 5
    mini = get_task("mini")
    assert fingerprint(mini) == fingerprint(get_task("mini")) != fingerprint(get_task("mini", train_size=19_999))
    assert mini.content_hash("train") != mini.content_hash("heldout")


def test_identity_is_what_decides_the_result():
    base = Identity.of(resolve(Config, [], recipe="mini"), {})
    free = ["--run.name=x", "--run.dir=y", "--run.steps=7", "--log.console=no", "--checkpoint.keep=9", "--run.resume"]
    same = Identity.of(resolve(Config, free, recipe="mini"), {})
    assert same.config_hash == base.config_hash and not same.differences(base)
    other = Identity.of(resolve(Config, ["--optim.lr=0.5", "--model.dtype=bfloat16"], recipe="mini"), {})
    assert other.config_hash != base.config_hash
    assert [line.split(":")[0] for line in other.differences(base)] == ["model.dtype", "optim.lr"]
    assert "'float32' before, 'bfloat16' now; the checkpoint's weights" in other.differences(base)[0]
    assert Identity(**json.loads(json.dumps({"settings": base.settings, "data": {}}))).config_hash == base.config_hash


def test_spans_are_phases(tmp_path: Path):
    def told() -> tuple[str, int]:
        here = Whereabouts(**json.loads((tmp_path / "rank_0.json").read_text()))
        assert here.pid == os.getpid() and here.trouble is None
        return here.phase, here.step

    step = random.randrange(1, 100)
    with Heartbeat(tmp_path, "test") as heartbeat:
        assert told() == ("load", 0)
        spans = TracedSpans(heartbeat)
        heartbeat.enter("bookkeeping", step)
        with spans("rollout"):
            assert told() == ("rollout", step)
            with spans("tools"):
                assert told() == ("tools", step)
            assert told() == ("rollout", step)
        assert told() == ("bookkeeping", step)
        with pytest.raises(KeyError), spans("train"):
            raise KeyError
        assert told() == ("train", step), "where an error came from"
        assert {"perf/rollout_s", "perf/tools_s", "perf/train_s"} <= spans.metrics().keys()


def test_where_a_rank_is_said_to_be():
    now = time.time()
    alive = Whereabouts(3, "elsewhere", 1, 7, "train", now - 60, now)
    assert alive.sentence == "rank 3 (pid 1 on elsewhere) is in step 7, train, for 60 s"
    silent = Whereabouts(3, "elsewhere", 1, 7, "train", now - 60, now - 40)
    assert silent.sentence == "rank 3 (pid 1 on elsewhere) has not been heard of for 40 s; it was in step 7, train"

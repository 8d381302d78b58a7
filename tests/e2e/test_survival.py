"""What clusters do to a run: kills, signals, full disks, damaged files, dead and silent ranks. Nothing is lost."""

import json
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.kill import arguments, kill_many, same, saved, whereabouts
from tests.e2e.lives import Life, Lives
from tests.e2e.runs import metrics

STEPS = 5
ANSWER_S = 60  # the machine may be busy; a hang would be far longer


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    with Lives(tmp_path_factory.mktemp("logs")) as opened:
        yield opened


@pytest.fixture(scope="module")
def whole(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run; its checkpoints are those of the last two steps."""
    directory = tmp_path_factory.mktemp("whole")
    must(lives.start(*arguments(directory, "run", STEPS)))
    return directory / "run"


def must(life: Life, code: int = 0) -> str:
    assert life.wait() == code, life.output[-3000:]
    return life.output


def wait_until(condition, *lives: Life) -> None:
    until = time.monotonic() + ANSWER_S
    while not condition():
        assert not any(life.over for life in lives), lives[0].output[-3000:]
        assert time.monotonic() < until, lives[0].output[-3000:]
        time.sleep(0.002)


def in_step(run: Path, life: Life, step: int) -> bool:
    return whereabouts(run, life.pid)[1] >= step


def test_kill_9_at_random_instants(lives: Lives, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    landed = kill_many(lives, 4, seed, tmp_path)
    assert any(kill.writing for kill in landed), f"no kill while a checkpoint was being written, seed {seed}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_last_whole_step_and_exits_with_0(
    lives: Lives, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    life = lives.start(*arguments(tmp_path, "run", STEPS, checkpoint__every=0))
    wait_until(lambda: in_step(run, life, 3), life)
    life.kill(number)
    said = must(life)
    stopped = saved(run)
    assert 2 <= stopped < STEPS and len(metrics(run)) == stopped
    assert f"stopped by {number.name} after step {stopped}; continue with --run.resume" in said
    assert not (run / "policy").exists()
    must(lives.start(*arguments(tmp_path, "run", STEPS, checkpoint__every=0, run__resume=True)))
    same(whole, run, STEPS)


def test_a_signal_to_one_rank_stops_all_and_another_number_of_ranks_goes_on(
    lives: Lives, whole: Path, tmp_path: Path
) -> None:
    """Two ranks, then one, then two: the steps are those of one rank, but for the order of the sums."""
    run = tmp_path / "run"
    first = lives.start_ranks(2, *arguments(tmp_path, "run", STEPS, checkpoint__every=0))
    wait_until(lambda: in_step(run, first[0], 2), *first)
    first[1].kill(signal.SIGTERM)
    outputs = [must(life) for life in first]
    stopped = saved(run)
    assert 1 <= stopped < STEPS - 1 and "stopped by" in outputs[0], outputs[0]
    one = lives.start(*arguments(tmp_path, "run", STEPS, checkpoint__every=0, run__resume=True))
    wait_until(lambda: in_step(run, one, stopped + 2), one)
    one.kill(signal.SIGTERM)
    must(one)
    assert stopped < saved(run) < STEPS
    for life in lives.start_ranks(2, *arguments(tmp_path, "run", STEPS, run__resume=True)):
        must(life)
    for mine, expected in zip(metrics(run), metrics(whole), strict=True):
        for name in ("policy/loss", "policy/grad_norm", "policy/lr"):
            assert mine[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), (mine["step"], name)


def test_a_time_limit_is_like_a_signal(lives: Lives, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = must(lives.start(*arguments(tmp_path, "run", 1000, run__time_limit="0:00:03", checkpoint__every=0)))
    assert f"stopped by run.time_limit after step {saved(run)}" in said
    assert len(metrics(run)) == saved(run) < 1000


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(lives: Lives, whole: Path, tmp_path: Path) -> None:
    """The file system refuses files beyond a size, as a full one or a quota does."""
    run = tmp_path / "run"
    must(lives.start(*arguments(tmp_path, "run", 2)))
    before = {file: file.read_bytes() for file in (run / "checkpoints/step_000002").iterdir()}
    said = must(lives.start(*arguments(tmp_path, "run", STEPS, run__resume=True), largest_file=2**20), code=2)
    assert "axpo.train: error: checkpoint" in said and "step_000003 could not be written" in said
    assert "File too large" in said and "--run.resume" in said and "Traceback" not in said
    assert {file: file.read_bytes() for file in before} == before
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
    must(lives.start(*arguments(tmp_path, "run", STEPS, run__resume=True)))
    same(whole, run, STEPS)


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_without_its_newest_checkpoint_a_run_continues_from_the_one_before(
    lives: Lives, whole: Path, tmp_path: Path, damage: str
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    newest = run / f"checkpoints/step_{STEPS:06d}"
    if damage == "deleted":
        shutil.rmtree(newest)
    else:
        shard = newest / "__0_0.distcp"
        shard.write_bytes(shard.read_bytes()[:-1000])
    said = must(lives.start(*arguments(tmp_path, "run", STEPS, run__resume=True)))
    assert ("__0_0.distcp: truncated" in said) == (damage == "truncated")
    assert ("continuing from step 4" in said) == (damage == "truncated")
    assert f"step {STEPS}/{STEPS}" in said and f"step {STEPS - 1}/{STEPS}" not in said
    same(whole, run, STEPS)
    assert saved(run) == STEPS


def test_a_dead_rank_is_named_with_its_phase(lives: Lives, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = lives.start_ranks(2, *arguments(tmp_path, "run", 1000, run__timeout_s=4))
    wait_until(lambda: in_step(run, ranks[0], 2), *ranks)
    ranks[1].kill()
    killed = time.monotonic()
    assert ranks[0].wait() != 0 and ranks[1].wait() == -9
    assert time.monotonic() - killed < ANSWER_S
    told = json.loads((run / "ranks/rank_1.json").read_text())
    expected = f"rank 1 (pid {ranks[1].pid} on {socket.gethostname()}) is dead; it was in step {told['step']}"
    assert f"axpo.train: error: {expected}, {told['phase']}" in ranks[0].output


def test_a_silent_rank_is_an_error_after_the_timeout(lives: Lives, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = lives.start_ranks(2, *arguments(tmp_path, "run", 1000, run__timeout_s=4))
    wait_until(lambda: in_step(run, ranks[0], 2), *ranks)
    ranks[1].kill(signal.SIGSTOP)
    stopped = time.monotonic()
    assert ranks[0].wait() != 0
    assert 3 < time.monotonic() - stopped < ANSWER_S
    told = json.loads((run / "ranks/rank_1.json").read_text())
    expected = f"rank 1 (pid {ranks[1].pid} on {socket.gethostname()}) is stopped; it was in step {told['step']}"
    assert f"axpo.train: error: {expected}, {told['phase']}" in ranks[0].output
    assert "axpo.train: error: rank 0: step" in ranks[0].output
    assert "Timed out waiting 4000ms" in ranks[0].output or "for run.timeout_s = 4 s" in ranks[0].output
    ranks[1].kill()
    assert ranks[1].wait() == -9


def test_a_port_in_use_is_refused_at_once(lives: Lives, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        launcher = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        said = must(lives.start(*arguments(tmp_path, "run", 1), **launcher), code=2)
    assert said.count("error") == 1 and f"MASTER_PORT {port}: the port is in use" in said and "set MASTER_PORT" in said
    assert not (tmp_path / "run").exists()

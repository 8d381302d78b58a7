"""torchrun's elastic restart: two agents on loopback stand for two nodes, one rank is killed, and the run goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.e2e.kill import arguments, saved
from tests.e2e.lives import ROOT
from tests.e2e.runs import metrics

STEPS = 5
PATIENCE_S = 240  # the agents and four workers import everything, on a machine that may be busy


def test_a_killed_rank_of_two_nodes_costs_a_restart_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    agents = [start_agent(tmp_path, node, port) for node in range(2)]
    try:
        wait_until(lambda: step_of(run, 1) >= 3 and saved(run) >= 1, agents, tmp_path)
        first = json.loads((run / "ranks/rank_1.json").read_text())["pid"]
        os.kill(first, signal.SIGKILL)
        codes = [agent.wait(timeout=PATIENCE_S) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    said = [(tmp_path / f"agent_{node}.log").read_text() for node in range(2)]
    assert codes == [0, 0], "".join(text[-3000:] for text in said)
    assert f"rank 1 (pid {first} on {socket.gethostname()}) is dead; it was in step" in said[0] + said[1]
    assert [row["step"] for row in metrics(run)] == list(range(1, STEPS + 1))
    assert (run / "policy/model.safetensors").is_file()
    assert (said[0] + said[1]).count(f"step 1/{STEPS}") == 1, "the restart resumed; it did not start over"


def start_agent(directory: Path, node: int, port: int) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--max-restarts", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    command = [*launcher, "-m", "axpo.train", *arguments(directory, "run", STEPS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (directory / f"agent_{node}.log").open("w") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )


def step_of(run: Path, rank: int) -> int:
    try:
        return json.loads((run / f"ranks/rank_{rank}.json").read_text())["step"]
    except (OSError, ValueError):
        return 0


def wait_until(condition, agents: list[subprocess.Popen], logs: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        told = "".join((logs / f"agent_{node}.log").read_text()[-3000:] for node in range(2))
        assert all(agent.poll() is None for agent in agents) and time.monotonic() < until, told
        time.sleep(0.02)

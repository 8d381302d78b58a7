"""Two ranks share benchmarks and a collection: the files are those of one process."""

import os
import subprocess
import sys
from pathlib import Path

from axpo.benchmarks import Results, open_benchmarks, run_benchmarks
from axpo.cli import resolve
from axpo.collect import Collection, collect
from axpo.config import CollectConfig, Config, SftConfig
from axpo.data import Rows
from axpo.paths import model_directory
from axpo.rollout import Agent
from axpo.sft_data import SftData
from axpo.tasks import get_task
from tests.axpo.pipeline_worker import COLLECT, EVALUATE

WORKER = Path(__file__).with_name("pipeline_worker.py")


def test_ranks_make_what_one_process_makes(tmp_path: Path, agent: Agent):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    two, one = tmp_path / "two", tmp_path / "one"
    done = subprocess.run([*command, str(two)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Pass@1" in done.stdout and "right ones with a tool call" in done.stdout

    options = EVALUATE | {"eval.benchmarks": "mini", "eval.out": one / "evaluated"}
    settings = resolve(Config, [f"--{name}={value}" for name, value in options.items()], recipe="mini")
    run_benchmarks(agent, open_benchmarks(settings), settings, Results(settings))
    options = COLLECT | {"collect.out": one / "collected"}
    settings = resolve(CollectConfig, [f"--{name}={value}" for name, value in options.items()], recipe="mini")
    collect(agent, get_task("mini"), settings, Collection(settings))
    made = {file.relative_to(one): file.read_bytes() for file in one.rglob("*") if file.suffix in (".jsonl", ".json")}
    assert made == {name: (two / name).read_bytes() for name in made} and len(made) == 4
    rows = Rows(one / "collected" / "rows")
    assert list(rows) == list(Rows(two / "collected" / "rows"))

    options = {"data.task": "jsonl", "data.path": two / "collected" / "rows", "sft.batch_size": len(rows)}
    sft = resolve(SftConfig, [f"--{name}={value}" for name, value in options.items()], recipe="mini-sft")
    trees = SftData(model_directory("mini"), sft, 0, 1).batch(1)
    assert len(trees) == len(rows) and all((tree.labels >= 0).any() for tree in trees)

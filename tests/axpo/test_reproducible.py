"""One seed, one set of trajectories: however they are batched, admitted, preempted, cached or dealt over ranks.

The noise of a token is keyed by its branch and position, so only the rounding of log-probs is left to differ: a GEMM's
bits depend on how many rows it has when there are few. In fp32 that is some 1e-6, against gaps between the two best
noisy scores of about 1; the tokens are equal, and the log-probs are held to 5e-5.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from axpo.paths import model_directory
from engine import LLM
from tests.axpo.explore_worker import ALGO, ALGOS, QUESTIONS, Made, roll_out


def undisturbed(name: str) -> Made:
    made, stats = roll_out(ALGOS[name], 1 + list(ALGOS).index(name))
    assert stats["preemptions"] == 0
    assert len(made) > QUESTIONS * ALGO.group_size, "nothing was resampled"
    return made


@pytest.fixture(scope="module")
def expected() -> Made:
    return undisturbed("axpo")


def assert_same(made: Made, expected: Made) -> None:
    assert made.keys() == expected.keys()
    for name, (tokens, logprobs) in made.items():
        assert tokens == expected[name][0], name
        for one, other in zip(logprobs, expected[name][1], strict=True):
            assert (one is None) == (other is None) and (one is None or abs(one - (other or 0.0)) < 5e-5), name


@pytest.mark.parametrize(
    "engine",
    [
        {"max_batch_tokens": 50, "max_num_seqs": 7},
        {"backwards": True},
        {"enable_prefix_caching": False, "share_prefixes": False, "block_size": 8},
    ],
    ids=["another batch size", "another admission order", "no cache, no sharing, other blocks"],
)
def test_another_engine_makes_the_same_trajectories(expected: Made, engine: dict[str, Any]) -> None:
    made, _ = roll_out(**engine)
    assert_same(made, expected)


def test_forced_preemption_makes_the_same_trajectories(expected: Made) -> None:
    block = LLM(model_directory("mini"), dtype=torch.float32, kv_cache_bytes=1 << 24).kv.bytes_per_block
    made, stats = roll_out(kv_cache_bytes=60 * block)
    assert stats["preemptions"] > 0
    assert_same(made, expected)


@pytest.mark.parametrize("name", [name for name in ALGOS if name != "axpo"])
def test_ablations_depend_on_the_engine_as_little(name: str) -> None:
    made, _ = roll_out(ALGOS[name], 1 + list(ALGOS).index(name), backwards=True, max_batch_tokens=50, max_num_seqs=7)
    assert_same(made, undisturbed(name))


def test_two_ranks_make_the_same_trajectories(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(root / "tests/axpo/explore_worker.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ALGOS:
        first, second = (json.loads((tmp_path / f"{name}_{rank}.json").read_text()) for rank in range(2))
        assert first and second and not first.keys() & second.keys()
        assert_same(first | second, undisturbed(name))

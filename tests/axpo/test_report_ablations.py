"""The report of runs that resample otherwise than AXPO, and of what each tool cost."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from axpo.config import Config, to_toml
from axpo.report import write_report
from axpo.report.branches import source_branch
from tests.axpo.test_report import read, rollout, words, write_run


@pytest.mark.parametrize(
    ("fork", "told", "kept"),
    [
        (5, "at the prompt", []),
        (8, "behind the thinking", ["think"]),
        (10, "at the opening tag of the first call", ["think"]),
        (20, "behind a tool response", ["think", "call"]),
    ],
)
def test_a_source_is_split_where_it_was_forked(fork: int, told: str, kept: list[str]) -> None:
    rng = random.Random(1)
    source = rollout(rng, 1, 1, 0, True, False, [100, 200, 400, 600])
    whole = ["think", "call", "think", "answer"]
    children = [replace(source, id=f"{source.id}/r{i}", parent=source.id, fork_token=fork) for i in range(2)]
    made = source_branch(source, 1, children, [], {})
    assert made.fork.startswith(told)
    assert [event.kind for event in made.prefix] == kept
    for branch in (made.original, *made.resamples):
        assert [event.kind for event in branch.events] == whole[len(kept) :]


def test_an_ablation_says_what_it_resampled(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=2)
    seen = words(read(write_report(tmp_path / "run", 1)))
    assert "opened its call" in seen and "another way than AXPO" not in seen
    algo = {"fork_at": "prompt"}
    config = Config.model_validate({"run": {"name": "run", "steps": 2}, "algo": algo})
    (tmp_path / "run" / "config.toml").write_text(to_toml(config))
    seen = words(read(write_report(tmp_path / "run", 1)))
    assert "algo.trigger = tool, algo.fork_at = prompt, algo.rank = confidence" in seen
    assert "opened its call" not in seen


def test_each_tool_has_its_lines(tmp_path: Path) -> None:
    logged = write_run(tmp_path / "run", steps=3)
    assert "Every call that reached a tool" not in words(read(write_report(tmp_path / "run", 0)))
    for record in logged:
        for name, seconds in (("python", 0.02), ("tavily-search", 1.5)):
            record |= {
                f"tool/{name}/calls": 12.0,
                f"tool/{name}/error_rate": 0.25,
                f"tool/{name}/timeout_rate": 0.125,
                f"tool/{name}/accuracy": 0.5,
                f"tool/{name}/latency_median_s": seconds,
                f"tool/{name}/latency_p95_s": 3 * seconds,
            }
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in logged))
    seen = words(read(write_report(tmp_path / "run", 0)))
    assert "Every call that reached a tool" in seen
    assert "python, timeouts 12 % → 12 %" in seen and "tavily-search 25 % → 25 %" in seen
    assert "python 0.02 → 0.02" in seen and "tavily-search, 95 % 4.5 → 4.5" in seen
    assert "clusters 4 → 4" not in seen.partition("Distinct calls")[0]
    assert "clusters 1 → 1" in seen, "boxes that overlap by half ask for the same"

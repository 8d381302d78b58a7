"""Benchmarks on the embedded model: what a line says, going on after a kill, and other settings."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from axpo.benchmarks import FAMILIES, Results, open_benchmarks, run_benchmarks
from axpo.cli import resolve
from axpo.config import Config
from axpo.data.adapters import ADAPTERS
from axpo.data.write import write_rows
from axpo.grading import Grader, Rubric
from axpo.outfolder import OutFolderError
from axpo.rollout import Agent
from axpo.tasks import get_task
from tests.axpo.pipeline_worker import EVALUATE


def config(out: Path, *benchmarks: str | Path, **options: Any) -> Config:
    given = {**EVALUATE, "eval.out": out, "eval.benchmarks": ",".join(map(str, benchmarks))}
    given |= {name.replace("__", "."): value for name, value in options.items()}
    return resolve(Config, [f"--{name}={value}" for name, value in given.items()], recipe="mini")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def rows(path: Path, count: int) -> Path:
    """The embedded questions as a file of rows."""

    def record(index: int) -> dict[str, Any]:
        question, out = get_task("mini").question("heldout", index), io.BytesIO()
        question.images[0].save(out, "PNG")
        return {
            "id": question.id,
            "messages": question.messages,
            "images": [out.getvalue()],
            "answer": question.answer,
            "grader": "number",
        }

    write_rows(map(record, range(count)), path)
    return path


def test_a_file_of_rows_is_what_the_embedded_set_is(tmp_path: Path, agent: Agent):
    settings = config(tmp_path / "out", "mini", rows(tmp_path / "copy.parquet", 3))
    made = run_benchmarks(agent, open_benchmarks(settings), settings, Results(settings))
    own, copy = (lines(tmp_path / "out" / f"{name}.jsonl") for name in ("mini", "copy"))
    assert len(own) == 12 and [one["resps"] for one in own] == [one["resps"] for one in copy]
    assert len({str(one["resps"]) for one in own}) > 3, "repeats and samples must differ"
    assert made["mini"].pass_1 == made["copy"].pass_1 and made["mini"].questions == 3
    # What lmms-eval's samples_*.jsonl and VLMEvalKit's records have, in their types.
    texts = ("doc_hash", "input", "target", "index", "question", "answer", "prediction")
    assert all(isinstance(one[name], str) for one in own for name in texts)
    assert all(isinstance(one["doc_id"], int) and one["hit"] in (0, 1) for one in own)
    assert len({one["doc_hash"] for one in own}) == 3 == len({(one["doc_id"], one["doc_hash"]) for one in own})
    order = [(one["repeat"], one["doc_id"], one["sample"]) for one in own]
    assert order == [(r, d, s) for r in range(2) for d in range(3) for s in range(2)]
    for one in copy:
        assert one["filtered_resps"] == [one["prediction"]] and one["answer"] == one["target"]
        assert one["used_tool"] == bool(one["tools"])
        assert one["resps"][0][0].count("<tool_response>") == one["turns"] - 1 <= len(one["tools"])
        right = one["prediction"] and Grader().compare(one["prediction"], Rubric((one["answer"],), "number"))
        assert one["hit"] == int(bool(right) and right.reward)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["benchmarks"]["copy"]["pass_1"]["repeats"] == list(made["copy"].pass_1)
    assert summary["families"]["perception"]["pass_1"] == summary["benchmarks"]["mini"]["pass_1"]
    assert summary["average"]["benchmarks"] == 2 and summary["benchmarks"]["copy"]["family"] == "copy"
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "| &nbsp;&nbsp;mini | 3 |" in text and "\n| copy | 3 |" in text and "image_zoom_in" in text
    assert agent.llm.stats()["blocks_used"] == 0


def test_it_goes_on_where_it_was_killed(tmp_path: Path, agent: Agent, monkeypatch: pytest.MonkeyPatch):
    settings = config(tmp_path, "mini")
    run_benchmarks(agent, open_benchmarks(settings), settings, Results(settings))
    whole = (tmp_path / "mini.jsonl").read_text()
    text = whole.splitlines(keepends=True)
    # As left by three ranks: rank 0 was killed in the middle of a write, rank 2 in the middle of a question.
    (tmp_path / "mini.jsonl").unlink()
    (tmp_path / "mini.0.jsonl").write_text("".join(text[:2]) + text[2][:20])
    (tmp_path / "mini.2.jsonl").write_text("".join(text[6:9]))
    asked: list[tuple[int, list[int]]] = []
    rollouts = agent.rollouts

    def spy(step: int, questions: Any, size: int, limits: Any) -> Any:
        asked.append((step, [doc for doc, _ in questions]))
        return rollouts(step, questions, size, limits)

    monkeypatch.setattr(agent, "rollouts", spy)
    run_benchmarks(agent, open_benchmarks(settings), settings, Results(settings))
    assert asked == [(0, [1, 2]), (1, [1, 2])]
    assert (tmp_path / "mini.jsonl").read_text() == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.toml",
        "mini.jsonl",
        "summary.json",
        "summary.md",
    ]
    asked.clear()
    more = config(tmp_path, "mini", eval__limit=4, eval__repeats=1)
    assert run_benchmarks(agent, open_benchmarks(more), more, Results(more))["mini"].questions == 4
    assert asked == [(0, [3])], "only what is new is sampled"


def test_results_of_other_settings_are_left_alone(tmp_path: Path):
    Results(config(tmp_path, "mini"))
    with pytest.raises(ValueError, match=r"eval\.temperature = 0\.5: .* holds results of 1\.0; .*eval\.out"):
        Results(config(tmp_path, "mini", eval__temperature=0.5))
    with pytest.raises(ValueError, match=r"run\.seed = 3: .* holds results of 0"):
        Results(config(tmp_path, "mini", run__seed=3))


def test_a_folder_that_takes_no_results_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutFolderError, match=r"eval\.out = '.*/file': cannot be written to: File exists"):
        Results(config(tmp_path / "file", "mini"))
    results = Results(config(tmp_path / "out", "mini"))
    (tmp_path / "out" / "mini.0.jsonl").mkdir()  # refuses as a full disk does, with an OSError
    with pytest.raises(OutFolderError, match=r"mini\.0\.jsonl could not be written: Is a directory; .* goes on"):
        results.append("mini", [{}])


def test_families_are_given_or_known(tmp_path: Path):
    file = rows(tmp_path / "hrbench-4k.parquet", 1)
    opened = open_benchmarks(config(tmp_path, "mini", file, f"mine={file}", f"search/x={file}", "reasoning/y=mini"))
    assert {name: one.family for name, one in opened.items()} == {
        "mini": "perception",
        "hrbench-4k": "perception",
        "mine": "perception",
        "x": "search",
        "y": "reasoning",
    }
    assert opened["y"].task.name == "mini" and opened["x"].task.size("heldout") == 1
    nine = {name for name, family in FAMILIES.items() if name in ADAPTERS}
    assert len(nine) == 9 and len({FAMILIES[name] for name in nine}) == 3


def test_benchmarks_that_are_none(tmp_path: Path):
    for entry, said in {
        "gone.jsonl": "no such file",
        "perceptoin": r"no such file, nor an embedded task: .*perception",
        "=mini": "before the = stands FAMILY/NAME or NAME",
    }.items():
        with pytest.raises(ValueError, match=rf"eval\.benchmarks = '{entry}': {said}"):
            open_benchmarks(config(tmp_path, entry))
    with pytest.raises(ValueError, match=r"eval\.benchmarks = 'mini': there is a 'mini' already"):
        open_benchmarks(config(tmp_path, "mini", "mini"))
    with pytest.raises(ValueError, match=r"eval\.benchmarks = 'a/b/c=mini': before the = stands FAMILY/NAME"):
        open_benchmarks(config(tmp_path, "a/b/c=mini"))
    with pytest.raises(ValueError, match=r"eval\.k = 5: Pass@k needs as many samples"):
        config(tmp_path, "mini", eval__k=5)

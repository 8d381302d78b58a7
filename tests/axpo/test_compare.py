"""Evaluations side by side: tables, paired changes, tools that both used, and what not all have."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from axpo.compare import SharedTool, compare, main, sheets
from tests.axpo.test_scores import line


def folder(path: Path, **benchmarks: list[dict[str, Any]]) -> Path:
    """As axpo.evaluate leaves it, less what is not read."""
    path.mkdir()
    families = {"zoom": "perception", "sums": "reasoning", "look": "perception"}
    for name, lines in benchmarks.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    summary = {"benchmarks": {name: {"family": families[name]} for name in benchmarks}}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def samples(*questions: list[tuple[Any, ...]], repeats: int = 2, first: int = 0) -> list[dict[str, Any]]:
    """Each question's samples, (hit, tool …) each; the same in every repeat."""
    return [
        line(repeat, doc, *given, index=f"q{first + doc}", sample=sample)
        for repeat in range(repeats)
        for doc, some in enumerate(questions)
        for sample, given in enumerate(some)
    ]


RIGHT, WRONG = [(1,), (1,)], [(0,), (0,)]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    grpo = folder(
        tmp_path / "grpo",
        zoom=samples([(0, "z"), (0, "z")], [(1, "z"), (0,)], RIGHT, WRONG),
        sums=samples(RIGHT, WRONG, [(1, "p"), (0, "p")]),
    )
    axpo = folder(
        tmp_path / "axpo",
        zoom=samples([(1, "z"), (0, "z")], [(0, "z"), (1, "z")], [(1, "z"), (1,)], WRONG),
        sums=samples(RIGHT, RIGHT, [(1,), (0,)]),
    )
    return {"grpo": grpo, "axpo": axpo}


def test_models_are_rows_and_families_columns(folders: dict[str, Path]):
    comparison = compare(folders)
    assert comparison.k == 2 and not comparison.left_out
    families, benchmarks, use, pairs, shared = sheets(comparison)
    assert families.columns == ["", "perception", "reasoning", "average"]
    assert families.rows == [
        ["grpo", "37.5 ± 0.0 / 50.0 ± 0.0", "50.0 ± 0.0 / 66.7 ± 0.0", "43.8 ± 0.0 / 58.3 ± 0.0"],
        ["axpo", "50.0 ± 0.0 / 75.0 ± 0.0", "83.3 ± 0.0 / 100.0 ± 0.0", "66.7 ± 0.0 / 87.5 ± 0.0"],
    ]
    assert benchmarks.columns == ["", "zoom", "sums"]
    assert use.rows[0] == ["grpo", "35.4%", "41.7%", "45.0%", "16.7%", "18.8%"]
    assert pairs.rows[0][0] == "grpo → axpo" and pairs.rows[0][1].startswith("+22.9 [")
    # Both zoomed on q0 (0 of 2, 1 of 2) and q1 (1 of 1, 1 of 2); only one model used the other tool.
    assert comparison.pairs["grpo", "axpo"].tools == {"z": SharedTool(2, 0.5, 0.5)}
    assert shared.rows == [["grpo → axpo", "z", "2", "50.0%", "50.0%"]]


def test_changes_are_paired_over_questions(tmp_path: Path):
    before = [RIGHT, WRONG] * 50
    after = [RIGHT, [(1,), (0,)]] * 50
    made = compare(
        {
            "a": folder(tmp_path / "a", zoom=samples(*before)),
            "b": folder(tmp_path / "b", zoom=samples(*after)),
            "c": folder(tmp_path / "c", zoom=samples(*reversed(before))),
        },
        k=1,
    ).pairs
    gain = made["a", "b"].pass_1
    assert gain.value == pytest.approx(0.25) and gain.low is not None and gain.high is not None
    # Changes are 0 or 1/2, half of each: a deviation of 1/4, and 100 questions.
    assert gain.low == pytest.approx(0.25 - 1.96 * 0.025, abs=0.006)
    assert gain.high == pytest.approx(0.25 + 1.96 * 0.025, abs=0.006)
    none = made["a", "c"].pass_1
    assert none.value == 0 and none.low is not None and none.low < -0.15


def test_only_what_all_have_is_compared(tmp_path: Path, folders: dict[str, Path]):
    folders["more"] = folder(
        tmp_path / "more", look=samples(RIGHT), zoom=samples(RIGHT, RIGHT, RIGHT, repeats=1, first=1)
    )
    made = compare(folders)
    assert {name: one.questions for name, one in made.results["grpo"].items()} == {"zoom": 3}
    assert {own["zoom"].repeats for own in made.results.values()} == {1}
    assert made.results["more"]["zoom"].pass_1 == (1.0,) and made.results["grpo"]["zoom"].pass_1 == (0.5,)
    left = ["grpo: sums", "axpo: sums", "more: look", "grpo: 10 samples of zoom", "axpo: 10 samples of zoom"]
    assert made.left_out == left


def test_what_cannot_be_compared(tmp_path: Path, folders: dict[str, Path]):
    with pytest.raises(ValueError, match=r"gone: no finished evaluation of axpo\.evaluate"):
        compare({**folders, "x": tmp_path / "gone"})
    with pytest.raises(ValueError, match=r"no benchmark that all have: grpo has zoom, sums;.* look has look"):
        compare({**folders, "look": folder(tmp_path / "look", look=samples(RIGHT))})
    with pytest.raises(ValueError, match="zoom: no question that all were asked"):
        compare({**folders, "late": folder(tmp_path / "late", zoom=samples(RIGHT, first=9))})
    with pytest.raises(ValueError, match="--k 3: Pass@k needs as many samples, and an evaluation has 2"):
        compare(folders, k=3)


def test_the_command_writes_tables_numbers_and_a_picture(tmp_path: Path, folders: dict[str, Path]):
    command = [sys.executable, "-m", "axpo.compare", *(f"{name}={path}" for name, path in folders.items())]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Pass@1 / Pass@2 by family" in done.stdout and "87.5 ± 0.0" in done.stdout
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert record["models"]["axpo"]["averages"]["average"]["pass_k"] == pytest.approx([0.875, 0.875])
    assert record["pairs"][0]["tools"] == {"z": {"questions": 2, "first": 0.5, "second": 0.5}}
    assert "| axpo | 50.0 ± 0.0 / 75.0 ± 0.0 |" in (tmp_path / "out" / "comparison.md").read_text()
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    done = subprocess.run([*command, "grpo=again"], capture_output=True, text=True)
    assert done.returncode == 2 and "axpo.compare: error: two folders have one name" in done.stderr


def test_what_cannot_be_asked(tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    for options, said in {
        ("--out", str(tmp_path / "file" / "out")): r"--out .*/file/out: cannot be made: Not a directory",
        ("--out", str(tmp_path / "file")): r"--out .*/file: cannot be made: File exists",
        ("--k", "-1"): r"--k -1: must be 1 or more",
    }.items():
        with pytest.raises(SystemExit) as ended:
            main([*(f"{name}={path}" for name, path in folders.items()), *options])
        assert ended.value.code == 2
        assert re.fullmatch(f"axpo.compare: error: {said}.*\n", capsys.readouterr().err)

"""Two evaluations tool by tool, on the questions that both asked it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from axpo.compare import Shared, main, shared_tools


def line(question: str, hit: int, *tools: str | None, benchmark: str = "b") -> dict[str, Any]:
    return {"benchmark": benchmark, "index": question, "hit": hit, "tools": list(tools)}


def test_only_questions_on_which_both_used_the_tool_count():
    first = [line("1", 1, "zoom"), line("1", 0, "zoom", "zoom"), line("1", 1), line("2", 1, "zoom"), line("3", 0, "py")]
    second = [line("1", 1, "zoom"), line("2", 1), line("3", 1, "py"), line("4", 0, "zoom"), line("4", 0, None)]
    made = shared_tools(first, second)
    assert made == {"py": Shared(1, (0.0, 1.0), 0, 0), "zoom": Shared(1, (0.5, 1.0), 1, 1)}
    assert shared_tools(first, [line("9", 1, "zoom")])["zoom"].accuracy is None
    assert shared_tools([line("1", 1, "zoom")], [line("1", 0, "zoom", benchmark="c")])["zoom"].questions == 0


def test_against_counting_by_hand():
    seed = random.getrandbits(32)
    rng = random.Random(seed)
    both = [
        [line(str(q), rng.randrange(2), *rng.sample(["a", "b"], rng.randrange(3))) for q in range(12) for _ in range(3)]
        for _ in range(2)
    ]
    for tool, shared in shared_tools(*both).items():
        asked = [{x["index"] for x in lines if tool in x["tools"]} for lines in both]
        common = asked[0] & asked[1]
        assert shared.questions == len(common), f"seed {seed}"
        for lines, accuracy in zip(both, shared.accuracy or (), strict=bool(common)):
            hits = [x["hit"] for x in lines if tool in x["tools"] and x["index"] in common]
            assert accuracy == pytest.approx(sum(hits) / len(hits)), f"seed {seed}"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, hit in (("sft", 0), ("axpo", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mini.jsonl").write_text(json.dumps(line("1", hit, "zoom")) + "\n")
    (tmp_path / "sft" / "other.0.jsonl").write_text("{")
    main([str(tmp_path / "sft"), str(tmp_path / "axpo")])
    shown = capsys.readouterr().out
    assert "0.0%" in shown and "100.0%" in shown and "+100.0" in shown and "benchmarks: mini" in shown
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "sft"), str(tmp_path / "empty")])
    assert stop.value.code == 2 and "no whole benchmark there" in capsys.readouterr().err

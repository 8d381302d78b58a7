"""The examples in docs/engine.md run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.filterwarnings("error")
def test_the_tree_search_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "engine.md").read_text(), re.DOTALL)
    example = next(block for block in blocks if "fork(4)" in block)
    exec(compile(example, "docs/engine.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[5, 6, 7, 8, ")

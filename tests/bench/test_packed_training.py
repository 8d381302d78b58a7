"""The benchmark of packed training: both systems train on the same tokens, and the report says what was computed."""

import json
from pathlib import Path

from bench import packed_training


def test_both_systems_agree(tmp_path: Path, capsys):
    file = tmp_path / "report.json"
    sizes = "--shape tiny --prompt 96 --image-tokens 16 --response 160 --rounds 1 --threads 1 --budget 700"
    assert packed_training.main([*sizes.split(), "--json", str(file)]) == 0, capsys.readouterr().out
    report = json.loads(file.read_text())
    tree, unshared = report["rows"]
    # The last token of a path is predicted and not computed; the failed source ends at its fork, half way.
    assert tree["tokens"] == 96 + 7 * 159 + 80 + 2 * 79
    assert unshared["tokens"] == 7 * (96 + 159) + (96 + 79) + 2 * (96 + 159)
    assert unshared["micro_batches"] > tree["micro_batches"] and report["ratio_of_operations"] > 1.2
    assert "DIFFER" not in capsys.readouterr().out

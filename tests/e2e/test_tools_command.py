"""`python -m axpo.tools`: one call as a trajectory would make it."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]


def tools(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "axpo.tools", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def test_a_call_prints_what_came_back(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (9, 8, 7)).save(tmp_path / "a.png")
    code = "w, h = _pil_images[0].size\nprint(w * h)\n_pil_images[0].show()"
    done = tools(
        "call", "python", json.dumps({"code": code}), "--image", str(tmp_path / "a.png"), "--out", str(tmp_path)
    )
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and list(answer) == ["ok", "text", "images", "error", "seconds"], done.stderr
    assert (answer["ok"], answer["text"], answer["error"]) == (True, "1200\n", None) and answer["seconds"] > 0
    assert Image.open(answer["images"][0]).size == (40, 30)


def test_a_wrong_call_is_an_answer_and_a_wrong_command_is_an_error(tmp_path: Path) -> None:
    wrong = tools("call", "image_zoom_in", '{"bbox_2d": [0, 0, 9, 9], "label": "x"}')
    assert wrong.returncode == 1 and json.loads(wrong.stdout)["ok"] is False
    for arguments, told in (
        (("call", "telescope", "{}"), "no tool 'telescope'"),
        (("call", "python", "{"), "not JSON"),
        (("call", "python", "[]"), "list; give a JSON object"),
        (("call", "python", "{}", "--image", str(tmp_path / "none.png")), "does not exist"),
        (("call", "python", "{}", "--python.sandbox", "jail"), "python.sandbox"),
    ):
        done = tools(*arguments)
        assert done.returncode == 2 and told in done.stderr + done.stdout, done.stderr
        assert "Traceback" not in done.stderr


def test_the_list_has_every_tools_schema() -> None:
    lines = [json.loads(line) for line in tools("list").stdout.splitlines()]
    assert {"image_zoom_in", "python"} <= {line["name"] for line in lines}
    assert all(line["parameters"]["type"] == "object" for line in lines)

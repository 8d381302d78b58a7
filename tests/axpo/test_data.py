"""Rows in all their formats: the same question from each, little memory, and messages that name file, row and field."""

import base64
import io
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from axpo.data import INSTRUCTION, DataError, Rows
from axpo.data.__main__ import list_adapters, show_row
from axpo.data.write import GROUP_ROWS, write_rows
from axpo.tasks import get_task


def png(seed: int, size: tuple[int, int] = (7, 5)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problems(path: Path, **options: Any) -> list[str]:
    with pytest.raises(DataError) as error:
        Rows(path).check(**options)
    return [line.replace(str(path), "F") for line in str(error.value).splitlines()]


def test_images_as_paths_bytes_and_data_uris_are_one(tmp_path: Path):
    seed = random.randrange(2**32)
    data = png(seed)
    (tmp_path / "x.png").write_bytes(data)
    row = {"id": "a", "question": "Which?", "answer": "7"}
    jsonl(tmp_path / "r.jsonl", row | {"images": ["x.png"]}, row | {"images": [uri(data)], "id": "b"})
    table = [
        row | {"images": [{"bytes": data, "path": None}]},
        row | {"id": "b", "images": [{"bytes": None, "path": "x.png"}]},
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "r.parquet")
    with (
        pa.OSFile(str(tmp_path / "r.arrow"), "wb") as out,
        pa.ipc.new_stream(out, pa.Table.from_pylist(table).schema) as w,
    ):
        w.write_table(pa.Table.from_pylist(table))
    for name in ("r.jsonl", "r.parquet", "r.arrow"):
        rows = Rows(tmp_path / name)
        assert len(rows) == 2 and rows.check() == {"exact": 2}
        for row_, name_ in zip(rows, "ab", strict=True):
            question = row_.question()
            assert question.id == name_ and question.text == f"Which?\n{INSTRUCTION}"
            assert np.array_equal(np.asarray(question.images[0]), pixels(data)), (seed, name)


def test_messages_take_their_images_in_order(tmp_path: Path):
    first, second, third = png(1), png(2), png(3)
    content = [
        {"type": "text", "text": "Compare"},
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": uri(second)}},
        {"type": "image", "image": uri(third)},
    ]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    row = {"id": "a", "messages": messages, "images": [uri(first)], "answer": ["7", 8], "grader": "number"}
    file = jsonl(tmp_path / "r.jsonl", row, row | {"id": "b", "images": [uri(first), uri(first)]})
    question = Rows(file)[0].question()
    assert [part["type"] for part in question.messages[1]["content"]] == ["text", "image", "image", "image"]
    assert question.text == "Compare" and question.rubric.answers == ("7", "8")
    for image, data in zip(question.images, (first, second, third), strict=True):
        assert np.array_equal(np.asarray(image), pixels(data))
    (line,) = problems(file)
    assert line == "F:2: row 'b': images: 1 more than messages have parts {type: image}"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role = 'robot': must be system, user"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0]: an image part, but",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0]: must be {type:"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content = ' ': must be text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages: the last is of role 'tool'"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}]},
            "messages[1].tool_calls: write it into content",
        ),
        ({"messages": "hello"}, "messages = 'hello': must be a list"),
        ({"question": "x", "messages": [{"role": "user", "content": "x"}]}, "question: there is messages already"),
        ({"question": "x", "images": ["data:image/png,abc"]}, "images[0]: not a data URI of an image"),
        ({"question": "x", "images": ["data:image/png;base64,a*"]}, "images[0]: not a data URI of an image"),
        ({"question": "x", "images": ["http://host/x.png"]}, "images[0] = 'http://host/x.png': a web address"),
        ({"question": "x", "images": [uri(b"GIF89a")]}, "images[0] cannot be"),
        ({"question": "x", "meta": 3}, "meta = 3: must be an object"),
        ({"question": "x", "answer": ["a", ""]}, "answer = '': must be text that is not empty"),
        ({"question": "x", "answer": "F", "grader": "choice", "options": ["x", "y"]}, "answer = 'F': grader 'choice'"),
        ({"question": "x", "grader": "guess"}, "grader = 'guess': there is exact"),
        ({"question": "x", "answer": math.nan}, "answer = nan: must be text that is not empty"),
        ({"question": "\ud800"}, "question = '\\ud800': has half of a surrogate pair"),
        (
            {"messages": [{"role": "user", "content": "\udfff"}]},
            "messages[0].content = '\\udfff': has half of a surrogate",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]},
            "messages[0].content[0]: must",
        ),
        ({"messages": "[" * 100_000}, "messages = '[[[["),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, wrong: dict[str, Any], message: str):
    line = problems(jsonl(tmp_path / "r.jsonl", {"id": "a", "answer": "7"} | wrong))[0]
    assert line.startswith(f"F:1: row 'a': {message}"), line


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path):
    out = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(out, "PNG")
    file = jsonl(tmp_path / "r.jsonl", {"id": "a", "question": "x", "answer": "7", "images": [uri(out.getvalue())]})
    (line,) = problems(file)
    assert line.startswith("F:1: row 'a': images[0] ") and "400000000 pixels" in line, line


def test_shards_of_a_folder_are_one_numbering(tmp_path: Path):
    rows = [{"id": f"q{i}", "question": f"Which {i}?", "answer": str(i), "images": [png(i)]} for i in range(150)]
    assert write_rows(rows[:140], tmp_path / "a.parquet") == 140
    assert write_rows(rows[140:], tmp_path / "sub" / "b.jsonl") == 10
    assert pq.ParquetFile(tmp_path / "a.parquet").metadata.num_row_groups == -(-140 // GROUP_ROWS)
    task = get_task("jsonl", path=tmp_path)
    assert task.size("train") == 150
    for index in random.Random(0).sample(range(150), 20):
        question = task.question("train", index)
        assert (question.id, question.answer) == (f"q{index}", str(index))
        assert np.array_equal(np.asarray(question.images[0]), pixels(png(index)))
    assert Rows(tmp_path).find("q77").rubric.answers == ("77",)  # type: ignore[union-attr]
    with pytest.raises(LookupError, match="no row with this id"):
        Rows(tmp_path).find("q999")


def test_all_that_a_row_can_say_survives_both_formats(tmp_path: Path):
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Sum?"}]},
        {"role": "assistant", "content": "I add.\n</think>\n<tool_call>\n{}\n</tool_call>"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    rows = [
        {"id": "talk", "messages": talk, "images": [png(0)], "meta": {"reward": 1.0, "tags": ["x"]}},
        {"id": "f", "question": "x", "answer": ["a", "b"], "grader": "f1", "threshold": 0.7, "meta": {"n": {"m": 1}}},
        {"id": "c", "question": "x", "answer": "B", "grader": "choice", "options": ["1", "2"]},
    ]
    for name in ("r.jsonl", "r.parquet"):
        write_rows(rows, tmp_path / name)
        talk_, f1, choice = Rows(tmp_path / name)
        assert talk_.is_conversation and talk_.messages == talk and talk_.rubric is None, name
        assert talk_.meta == rows[0]["meta"] and f1.meta == rows[1]["meta"]
        assert f1.rubric is not None and (f1.rubric.answers, f1.rubric.threshold) == (("a", "b"), 0.7)
        assert choice.rubric is not None and choice.rubric.options == ("1", "2")
        assert Rows(tmp_path / name).check() == {"f1": 1, "choice": 1}
        assert problems(tmp_path / name, conversations=False)[0].endswith(
            "end with 'assistant'; here they must with 'user'"
        )


def test_files_that_are_cut_short(tmp_path: Path):
    write_rows(
        ({"id": str(i), "question": "x", "answer": "7", "images": [png(i)]} for i in range(200)), tmp_path / "r.parquet"
    )
    whole = (tmp_path / "r.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.parquet: cut short, or not a Parquet file"):
        Rows(tmp_path / "cut.parquet")
    holed = bytearray(whole)
    holed[4 : len(whole) // 3] = bytes(len(whole) // 3 - 4)
    (tmp_path / "hole.parquet").write_bytes(holed)
    assert problems(tmp_path / "hole.parquet")[0].startswith("F: row 0: row group 0 is damaged")
    (tmp_path / "cut.arrow").write_bytes(b"\xff\xff\xff\xff\x10")
    with pytest.raises(DataError, match=r"cut\.arrow: cut short, or not an Arrow file"):
        Rows(tmp_path / "cut.arrow")
    (tmp_path / "r.csv").write_text("id")
    with pytest.raises(DataError, match=r"r\.csv: the format of this file is unknown; there is \.arrow"):
        Rows(tmp_path / "r.csv")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"void: no \.jsonl, \.parquet, \.arrow file"):
        Rows(tmp_path / "void")


def test_a_row_that_was_not_checked_is_named_when_it_is_read(tmp_path: Path):
    rows: list[dict[str, Any]] = [{"id": str(i), "question": "x", "answer": "7"} for i in range(10)]
    rows[7]["answer"] = ""
    file = jsonl(tmp_path / "r.jsonl", *rows)
    task = get_task("jsonl", path=file, check_rows=2)
    assert task.question("train", 6).id == "6"
    with pytest.raises(DataError, match=r"r\.jsonl:8: row '7': answer = ''"):
        task.question("train", 7)
    with pytest.raises(DataError, match=r"r\.jsonl:8"):
        get_task("jsonl", path=file, check_rows=0)


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    """200 MB of images, visited at random, in a process that may not hold half of them."""
    row = {"question": "x", "answer": "7"}
    noise = np.random.default_rng(0).bytes(1 << 20)
    write_rows((row | {"id": str(i), "images": [noise]} for i in range(200)), tmp_path / "r.parquet")
    code = (
        "import resource, sys; from axpo.data import Rows; rows = Rows(sys.argv[1]); rows[0]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert sum(len(rows[i].pictures[0]) for i in range(0, 200, 3)) == 67 << 20\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3 * GROUP_ROWS << 10, f"{done.stdout} KiB more than with one row group"


def test_the_command(tmp_path: Path):
    def run(*words: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "axpo.data", *map(str, words)], capture_output=True, text=True)

    good = jsonl(tmp_path / "good.jsonl", {"id": "a", "question": "x", "answer": "7", "grader": "math"})
    done = run("check", good)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == f"{good}: 1 rows are right: 1 by math\n"
    bad = jsonl(tmp_path / "bad.jsonl", {"id": "a", "question": "x", "answer": " "})
    done = run("check", good, bad)
    assert done.returncode == 2
    assert done.stderr == f"axpo.data: error: {bad}:1: row 'a': answer = ' ': must be text that is not empty\n"


def test_a_row_is_shown_as_it_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    row = {"id": "a", "question": "Which?", "answer": "7", "images": [png(0)], "meta": {"level": 3}}
    write_rows([row], tmp_path / "r.parquet")
    show_row(tmp_path / "r.parquet", 0)
    shown = capsys.readouterr().out
    for words in ("id: a\n", "images: 7x5\n", "Which?", "kind='exact'", "{'level': 3}"):
        assert words in shown
    list_adapters()
    assert "mathvision         MathLLMs/MathVision, split testmini (304 rows)\n" in capsys.readouterr().out

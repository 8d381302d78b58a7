"""Own questions from JSON lines: what is right is read, what is wrong is named by file, row and field."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from axpo.data import INSTRUCTION, DataError, Rows
from axpo.data.__main__ import export_file
from axpo.tasks import get_task
from axpo.tasks.rows import RowsTask


def save_image(path: Path, seed: int, mode: str = "RGB") -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (5, 7) if mode == "L" else (5, 7, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    )
    return path


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "question": "Which?", "images": ["ok.png"], "answer": "7", **changes}


def problems(tmp_path: Path, *rows: Any) -> list[str]:
    save_image(tmp_path / "ok.png", 0)
    file = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(DataError) as error:
        RowsTask(file)
    return [line.replace(str(file), "rows") for line in str(error.value).splitlines()]


def test_questions_as_the_agent_loop_takes_them(tmp_path: Path):
    seed = random.randrange(2**32)
    pixels = save_image(tmp_path / "img" / "x.png", seed)
    save_image(tmp_path / "grey.png", seed, "L")
    train = write(
        tmp_path / "train.jsonl",
        row(id="two", images=["img/x.png", "grey.png"], question="Größe?\u2028Which?"),
        "",
        json.dumps(row(id="none", answer=3.5), ensure_ascii=False).replace('"images": ["ok.png"], ', ""),
    )
    heldout = write(tmp_path / "heldout.jsonl", row(id="absolute", images=[str(tmp_path / "grey.png")]))
    task = get_task("jsonl", path=train, heldout_path=heldout)
    assert (task.name, task.size("train"), task.size("heldout")) == ("jsonl", 2, 1)
    question = task.question("train", 0)
    assert (question.id, question.answer) == ("two", "7")
    assert question.messages == [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "image"},
                {"type": "text", "text": f"Größe?\u2028Which?\n{INSTRUCTION}"},
            ],
        }
    ]
    assert np.array_equal(np.asarray(question.images[0]), pixels), f"seed {seed}"
    assert [image.mode for image in question.images] == ["RGB", "RGB"]
    assert task.question("train", 1).images == [] and task.question("train", 1).answer == "3.5"
    assert task.question("heldout", 0).id == "absolute"
    with pytest.raises(IndexError, match="2 questions, none with index 2"):
        task.question("train", 2)


def test_without_a_heldout_file_there_are_no_heldout_questions(tmp_path: Path):
    assert RowsTask(write(tmp_path / "t.jsonl", row(images=[]))).size("heldout") == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"answer": None}, "row 'a': answer = None: must be text that is not empty"),
        ({"answer": "  "}, "row 'a': answer = '  ': must be text that is not empty"),
        ({"answer": True}, "row 'a': answer = True: must be text that is not empty"),
        ({"answer": "{7"}, "row 'a': answer = '{7': braces do not match"),
        ({"question": ""}, "row 'a': question = '': must be text that is not empty"),
        ({"id": []}, "id = []: must be text that is not empty"),
        ({"images": "ok.png"}, "row 'a': images = 'ok.png': must be a list of file names"),
        ({"images": ["ok.png", 3]}, "row 'a': images = ['ok.png', 3]: must be a list of file names"),
        ({"image": "ok.png"}, "row 'a': image: unknown field; a row has id, question, images, answer"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, wrong: dict[str, Any], message: str):
    (line,) = problems(tmp_path, row(id="fine"), row(**wrong))
    assert line.startswith(f"rows:2: {message}"), line


def test_a_row_without_an_answer_and_lines_that_are_no_rows(tmp_path: Path):
    missing = row()
    del missing["answer"]
    lines = problems(tmp_path, missing, "{", '["a"]', row(id="b"), "", row(id="b"))
    assert lines[0] == "rows:1: row 'a': answer: missing"
    assert lines[1].startswith("rows:2: not valid JSON: ")
    assert lines[2].startswith("rows:3: must be a JSON object with id, question, images, answer, got list")
    assert lines[3:] == ["rows:6: id = 'b': line 4 has the same id"]
    assert problems(tmp_path, row(), "[" * 100_000)[0] == "rows:2: not valid JSON: it is nested too deeply"
    assert problems(tmp_path, row(), '{"id": "b", "quest')[0].startswith("rows:2: not valid JSON: "), "cut"


def test_images_that_cannot_be_used_are_found_before_training(tmp_path: Path):
    save_image(tmp_path / "whole.png", 3)
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    images = ["ok.png", "missing.png", "cut.png", "text.png", "folder.png"]
    lines = problems(tmp_path, row(images=images))
    assert len(lines) == 4 and all(line.startswith("rows:1: row 'a': images[") for line in lines), lines
    for index, words in {
        1: "missing.png does not exist",
        2: "cut.png cannot be decoded",
        3: "text.png cannot be",
    }.items():
        assert f"images[{index}]" in lines[index - 1] and words in lines[index - 1], lines
    assert "images[4]" in lines[3] and "folder.png" in lines[3]


@pytest.mark.timeout(60)
def test_images_and_files_that_would_hang_or_fill_memory(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    lines = problems(tmp_path, row(images=["ok.png", "pipe.png", "device.png"]))
    assert "images[1]" in lines[0] and "pipe.png cannot be read: it is a named pipe" in lines[0]
    assert "images[2]" in lines[1] and "device.png cannot be read: it is a device" in lines[1]
    rows = Rows(write(tmp_path / "more.jsonl", row(images=["pipe.png"])))
    with pytest.raises(OSError, match="named pipe"):
        rows.content_hash()
    for suffix in ("jsonl", "parquet", "arrow", "json", "tsv"):
        os.mkfifo(tmp_path / f"pipe.{suffix}")
        (tmp_path / f"device.{suffix}").symlink_to("/dev/zero")
        for kind in ("pipe", "device"):
            with pytest.raises(DataError, match=rf"{kind}\.{suffix}: cannot be read: it is no file"):
                Rows(tmp_path / f"{kind}.{suffix}")
        sparse = tmp_path / f"sparse.{suffix}"
        with sparse.open("wb") as file:
            file.truncate(10 << 30)
        with pytest.raises(DataError, match=rf"sparse\.{suffix}.*(a line of|cut short|bytes in one JSON list)"):
            Rows(sparse)


def test_many_problems_are_counted(tmp_path: Path):
    lines = problems(tmp_path, *[row(id=str(i), answer="") for i in range(25)])
    assert len(lines) == 11 and lines[-1] == "… and 15 more problems"


def test_files_that_hold_no_rows(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read"):
        RowsTask(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"empty\.jsonl: no rows; each line is a JSON object"):
        RowsTask(write(tmp_path / "empty.jsonl", "", " "))
    good = write(tmp_path / "good.jsonl", row(images=[]))
    with pytest.raises(DataError, match=r"empty\.jsonl: no rows"):
        RowsTask(good, tmp_path / "empty.jsonl")


@pytest.mark.parametrize("name", ["mini", "reasoning", "search", "suite"])
def test_questions_of_a_task_as_rows_are_the_same_questions(tmp_path: Path, name: str):
    export_file(name, tmp_path / "rows.parquet", split="heldout", count=3)
    task, rows = get_task(name), get_task("jsonl", path=tmp_path / "rows.parquet")
    assert rows.size("train") == 3 and rows.kinds() <= task.kinds()
    for index in range(3):
        asked, again = task.question("heldout", index), rows.question("train", index)
        for field in ("id", "messages", "answer", "rubric"):
            assert getattr(again, field) == getattr(asked, field)
        assert [image.tobytes() for image in again.images] == [image.tobytes() for image in asked.images]
        assert again.meta == json.loads(json.dumps(asked.meta))


def test_rows_are_exported_as_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    export_file("mini", tmp_path / "rows.parquet", count=3)
    export_file(str(tmp_path / "rows.parquet"), tmp_path / "two.jsonl", count=2)
    assert [row.id for row in Rows(tmp_path / "two.jsonl")] == ["mini/train/0", "mini/train/1"]
    assert "2 of 3 questions of" in capsys.readouterr().out


def test_what_cannot_be_exported(tmp_path: Path):
    with pytest.raises(ValueError, match=r"siute: no such file, nor an embedded task: .*suite"):
        export_file("siute", tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="--count -2: must be 1 or more"):
        export_file("mini", tmp_path / "rows.parquet", count=-2)
    assert not list(tmp_path.iterdir())

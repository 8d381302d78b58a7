"""Every adapter on a fixture in the published schema: the row that comes out, and how it is graded."""

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from axpo.data import DataError, Row, Rows
from axpo.data.adapters import ADAPTERS, Conversion
from axpo.data.write import write_rows
from axpo.grading import Grader


def png(size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, "PNG")
    return out.getvalue()


PNG = png((31, 17))
FEATURE = {"bytes": PNG, "path": None}
CHOICES = "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
LETTER = "Answer with the option's letter from the given choices directly."


def parquet(folder: Path, record: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist([record]), folder / "source.parquet")
    return folder / "source.parquet"


def lines(folder: Path, record: dict[str, Any]) -> Path:
    (folder / "source.jsonl").write_text(json.dumps(record) + "\n")
    return folder / "source.jsonl"


def listed(folder: Path, record: dict[str, Any]) -> Path:
    (folder / "source.json").write_text(json.dumps([record]))
    return folder / "source.json"


def tsv(folder: Path, record: dict[str, Any]) -> Path:
    quoted = ['"' + str(value).replace('"', '""') + '"' for value in record.values()]
    (folder / "source.tsv").write_text("\t".join(record) + "\n" + "\t".join(quoted) + "\n")
    return folder / "source.tsv"


HRBENCH = {
    "index": 3,
    "question": 'What does the "sign" say?\nLook closely.',
    "answer": "B",
    "category": "single",
    **dict(zip("ABCD", ("Stop", "Go", "Turn", "Wait"), strict=True)),
    "cycle_category": "cycle_1",
    "image": base64.b64encode(PNG).decode(),
}
MATHVISION = {
    "id": "4",
    "question": "Which number should replace the question mark?\n<image1>",
    "options": [],
    "image": "images/4.jpg",
    "decoded_image": FEATURE,
    "answer": "\\frac{1}{2}",
    "solution": None,
    "level": 3,
    "subject": "arithmetic",
}
DYNAMATH = {
    "id": "1",
    "question": "What is the area?",
    "image": "images/1.png",
    "decoded_image": FEATURE,
    "ground_truth": "12.566",
    "answer_type": "float",
    "subject": "plane geometry",
    "knowledge_level": "high school",
}
MMSEARCH = {
    "sample_id": "7",
    "query": "Who won the match in the picture?",
    "query_image": FEATURE,
    "image_search_result": FEATURE,
    "area": "news",
    "subfield": "Sports",
    "timestamp": "2024-07-01",
    "gt_requery": "winner",
    "gt_answer": "Carlos Alcaraz",
    "alternative_gt_answers": ["Alcaraz"],
}

MATHVR = {
    "id": "9",
    "question": "Compare <image1> and <image3>. Draw the height.",
    **{f"image{index}": FEATURE if index in (1, 3) else None for index in range(1, 9)},
    "category": "multimodal",
    "answers": ["2\\sqrt{3}"],
    "number_of_answers": 1,
    "scoring_points": ["…"],
    "scores": [1],
    "total_score": 1,
}

# (adapter, how it is published, record, id, grader, a right answer, a wrong one, images)
Case = tuple[str, Callable[[Path, dict[str, Any]], Path], dict[str, Any], str, str, str, str, int]
CASES: list[Case] = [
    (
        "virl39k",
        parquet,
        {
            "qid": "Geo-12",
            "question": "<image>\nFind the angle.",
            "answer": "\\boxed{17^\\circ}",
            "image": ["images/a.png"],
            "category": "STEM",
            "source": "MMK12",
            "PassRate_32BTrained": 0.75,
        },
        *("virl39k/Geo-12", "math", "17^\\circ", "71", 1),
    ),
    (
        "fvqa",
        parquet,
        {
            "data_id": "fvqa_train_3",
            "prompt": [{"role": "user", "content": "<image>Which tower is this?"}],
            "images": [FEATURE],
            "reward_model": {
                "ground_truth": "the Eiffel Tower",
                "candidate_answers": '["Tour Eiffel"]',
                "style": "rule",
            },
            "data_source": "fvqa",
            "category": "search_required",
        },
        *("fvqa/fvqa_train_3", "f1", "Tour Eiffel", "Big Ben", 1),
    ),
    (
        "pyvision-rl",
        listed,
        {
            "id": "0",
            "question": CHOICES + LETTER,
            "answer": "A",
            "ability": "visual_search",
            "data_source": "vstar",
            "image_path": "images/a.png",
        },
        *("pyvision-rl/vstar/0", "choice", "rubber", "cotton", 1),
    ),
    (
        "mmfinereason",
        parquet,
        {
            "id": 5,
            "question": "How many?",
            "solution": "\\boxed{42}",
            "data_source": "MMR1",
            "image": FEATURE,
            "qwen3vl_235b_thinking_response": "<think>…",
        },
        *("mmfinereason/MMR1/5", "math", "42.0", "41", 1),
    ),
    (
        "mmfinereason",
        parquet,
        {
            "source": "BMMR",
            "id": 7,
            "ori_question": "…",
            "original_answer": "B",
            "question": CHOICES,
            "answer": "B",
            "image": FEATURE,
            "caption": "…",
            "qwen3vl_235b_thinking_response": "<think>…",
            "pass_rate": 0.25,
            "is_consistent": True,
            "consistency_analysis": "…",
        },
        *("mmfinereason/BMMR/7", "choice", "cotton", "rubber", 1),
    ),
    ("mathvision", parquet, MATHVISION, "mathvision/4", "math", "0.5", "2", 1),
    (
        "mathvision",
        parquet,
        {**MATHVISION, "options": ["red", "green"], "answer": "B"},
        *("mathvision/4", "choice", "green", "red", 1),
    ),
    (
        "mathvision",
        parquet,
        {**MATHVISION, "options": ["A", "B", "C"], "answer": "C"},
        *("mathvision/4", "choice", "C", "B", 1),
    ),
    ("dynamath", parquet, DYNAMATH, "dynamath/1", "number", "12.57", "12.6", 1),
    (
        "dynamath",
        parquet,
        {**DYNAMATH, "answer_type": "multiple choice", "ground_truth": "C"},
        *("dynamath/1", "choice", "C", "A", 1),
    ),
    (
        "dynamath",
        parquet,
        {**DYNAMATH, "answer_type": "text", "ground_truth": "yes"},
        *("dynamath/1", "exact", "Yes", "no", 1),
    ),
    (
        "math-vr",
        parquet,
        {**MATHVR, "question": "Draw the height.", "category": "text"},
        *("math-vr/9", "math", "\\sqrt{12}", "3", 0),
    ),
    ("math-vr", parquet, MATHVR, "math-vr/9", "math", "2\\sqrt{3}", "3", 2),
    (
        "math-vr",
        parquet,
        {**MATHVR, "answers": ["AB = 3", "BC = 4"], "number_of_answers": 2},
        *("math-vr/9", "judge", "AB = 3; BC = 4", "", 2),
    ),
    (
        "visualprobe-hard",
        listed,
        {"images": ["images/a.png"], "problem": "<image>What is on the van?", "solution": "Acme", "doc_id": "VP_1"},
        *("visualprobe/VP_1", "judge", "acme", "", 1),
    ),
    (
        "vstar",
        lines,
        {
            "image": "images/a.png",
            "text": CHOICES + LETTER,
            "category": "direct_attributes",
            "label": "C",
            "question_id": 0,
        },
        *("vstar/direct_attributes/0", "choice", "(C)", "D", 1),
    ),
    (
        "visualprobe-hard",
        listed,
        {"images": ["images/a.png"], "problem": "<image>What is written on the van?", "solution": "Acme Movers"},
        *("visualprobe/0", "judge", "acme movers", "", 1),
    ),
    ("hrbench-4k", parquet, HRBENCH, "hrbench/3", "choice", "Go", "Stop", 1),
    ("hrbench-8k", tsv, HRBENCH, "hrbench/3", "choice", "B", "A", 1),
    (
        "hr-mmsearch",
        parquet,
        {
            "sample_id": "hr_1",
            "query": "Who designed the building?",
            "query_image": FEATURE,
            "ground_truth": "Zaha Hadid",
            "difficulty": "hard",
            "category": "art",
        },
        *("hr-mmsearch/hr_1", "f1", "Zaha Hadid", "Norman Foster", 1),
    ),
    ("mmsearch", parquet, MMSEARCH, "mmsearch/7", "f1", "Alcaraz", "Djokovic", 1),
    ("mmsearch", parquet, {**MMSEARCH, "query_image": None}, "mmsearch/7", "f1", "Carlos Alcaraz", "Sinner", 0),
]


@pytest.fixture(scope="module")
def grader() -> Any:
    made = Grader(math_workers=1)
    yield made
    made.close()


def convert(name: str, source: Path) -> Row:
    (source.parent / "images").mkdir(exist_ok=True)
    (source.parent / "images" / "a.png").write_bytes(PNG)
    out = source.parent / "rows.parquet"
    assert write_rows(Conversion(name, source), out) == 1
    return Rows(out)[0]


@pytest.mark.parametrize("case", CASES, ids=[f"{case[0]}-{index}" for index, case in enumerate(CASES)])
def test_the_row_of_a_published_record(tmp_path: Path, grader: Grader, case: Case):
    name, publish, record, row_id, kind, right, wrong, images = case
    row = convert(name, publish(tmp_path, record))
    assert row.rubric is not None and (row.id, row.rubric.kind) == (row_id, kind)
    question = row.question()
    assert [image.size for image in question.images] == [(31, 17)] * images
    assert "<image" not in question.text and LETTER not in question.text
    given = str(record.get("question") or record.get("text") or record.get("query") or "")
    for line in re.sub(r"<image\d*>\s*", "", given).replace(LETTER, "").split("\n"):
        assert line in question.text
    assert grader.compare(right, row.rubric).reward == 1.0
    assert grader.compare(wrong, row.rubric).reward == 0.0


def test_every_adapter_has_a_case():
    assert {case[0] for case in CASES} == set(ADAPTERS)


def test_images_are_found_from_the_folder_above(tmp_path: Path):
    (tmp_path / "VisualProbe_Hard").mkdir()
    record = {"images": ["VisualProbe_Hard/images/a.png"], "problem": "What?", "solution": "Acme"}
    assert len(convert("visualprobe-hard", listed(tmp_path / "VisualProbe_Hard", record)).question().images) == 1


def test_options_stand_in_the_question(tmp_path: Path):
    assert "A. Stop\nB. Go\nC. Turn\nD. Wait\n" in convert("hrbench-4k", parquet(tmp_path, HRBENCH)).question().text
    row = convert("mathvision", parquet(tmp_path, {**MATHVISION, "options": ["red", "green"], "answer": "B"}))
    assert "A. red\nB. green\n" in row.question().text


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_field_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, name: str):
    with pytest.raises(DataError) as error:
        list(Conversion(name, listed(tmp_path, {"unknown": 1})))
    assert "source.json: row 0: " in str(error.value) and "missing; the record has unknown" in str(error.value)


def test_wrong_records_stop_the_conversion_or_are_counted(tmp_path: Path):
    good = {"image": "a.png", "text": CHOICES, "category": "x", "label": "A", "question_id": 0}
    (tmp_path / "a.png").write_bytes(PNG)
    records = [good, {**good, "label": "E"}, {**good, "image": "gone.png"}, {**good, "label": ""}]
    source = tmp_path / "test_questions.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = [
        sys.executable,
        "-m",
        "axpo.data",
        "convert",
        "--from",
        "vstar",
        str(source),
        str(tmp_path / "out.jsonl"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"{source}:2: " in done.stderr and "answer = 'E'" in done.stderr
    assert not (tmp_path / "out.jsonl").exists() and not list(tmp_path.glob("*.part"))
    done = subprocess.run([*command, "--skip"], capture_output=True, text=True)
    assert done.returncode == 0 and "1 rows of vstar, 3 left out" in done.stdout
    assert "gone.png does not exist" in done.stderr and "published split has 191 rows" in done.stderr
    assert Rows(tmp_path / "out.jsonl").check() == {"choice": 1}

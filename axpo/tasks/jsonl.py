"""Your own questions: JSON lines {id, question, images: [paths], answer}, checked row by row before training starts.

A row may also say how its answer is compared: `grader` (exact, choice, number, math, f1, anls, judge), with `options`,
`tolerance` or `threshold` (axpo.grading.Rubric). `answer` may be a list, of which any is right.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axpo.grading import Kind, Rubric
from axpo.images import load_image
from axpo.resume import hash_files
from axpo.tasks import SPLITS, Question, Split

INSTRUCTION = r"Give the final answer as <answer>\boxed{...}</answer>."
_FIELDS = ("id", "question", "images", "answer")
_GRADING = ("grader", "options", "tolerance", "threshold")
_SHOWN = 10


class JsonlError(ValueError):
    """Rows that cannot be used: one line for each problem, naming file, line, row and field."""


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    question: str
    images: tuple[Path, ...]
    rubric: Rubric


class JsonlTask:
    """Questions from files. Image paths are relative to the file that names them; `images` may be left out or empty.

    Every row of both files is checked and every image decoded once, here: JsonlError lists what is wrong. Images are
    loaded anew for each question, so that a large set does not stay in memory.
    """

    name = "jsonl"

    def __init__(self, path: str | Path, heldout_path: str | Path = ""):
        self._rows: dict[str, list[Row]] = {
            split: read_rows(file) if str(file) else []
            for split, file in zip(SPLITS, (path, heldout_path), strict=True)
        }

    def size(self, split: Split) -> int:
        return len(self._rows[split])

    def kinds(self) -> set[Kind]:
        return {row.rubric.kind for rows in self._rows.values() for row in rows}

    def question(self, split: Split, index: int) -> Question:
        if not 0 <= index < self.size(split):
            raise IndexError(f"jsonl/{split} has {self.size(split)} questions, none with index {index}")
        row = self._rows[split][index]
        text = f"{row.question}\n{INSTRUCTION}"
        content = [{"type": "image"} for _ in row.images] + [{"type": "text", "text": text}]
        images = [load_image(path) for path in row.images]
        return Question(
            id=row.id,
            messages=[{"role": "user", "content": content}],
            images=images,
            answer=row.rubric.answers[0],
            rubric=row.rubric,
        )

    def content_hash(self, split: Split) -> str:
        """Of every row and every image file, in the order of the rows; where the files lie does not matter."""
        rows = self._rows[split]
        texts = [json.dumps([row.id, row.question, repr(row.rubric), len(row.images)]) for row in rows]
        return hash_files([path for row in rows for path in row.images], *texts)


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file; JsonlError when the file cannot be read, has no row, or any row is wrong."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON strings may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise JsonlError(f"{path}: cannot be read: {error}") from None
    rows: list[Row] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row, wrong = _row(line, path.parent)
        if row is not None and seen.setdefault(row.id, number) != number:
            wrong.append(f"id = {row.id!r}: line {seen[row.id]} has the same id")
        problems += [f"{path}:{number}: {problem}" for problem in wrong]
        if row is not None:
            rows.append(row)
    if problems:
        more = [f"… and {len(problems) - _SHOWN} more problems"] if len(problems) > _SHOWN else []
        raise JsonlError("\n".join(problems[:_SHOWN] + more))
    if not rows:
        raise JsonlError(f"{path}: no rows; each line is a JSON object with {', '.join(_FIELDS)}")
    return rows


def _row(line: str, folder: Path) -> tuple[Row | None, list[str]]:
    """The row, or None with every problem of the line."""
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        return None, [f"not valid JSON: {error}"]
    if not isinstance(record, dict):
        return None, [f"must be a JSON object with {', '.join(_FIELDS)}, got {type(record).__name__}"]
    name = f"row {record['id']!r}: " if isinstance(record.get("id"), str) else ""
    problems = [
        f"{field}: unknown field; a row has {', '.join(_FIELDS)}"
        for field in record
        if field not in (*_FIELDS, *_GRADING)
    ]
    texts = {field: _text(record, field, problems) for field in ("id", "question")}
    rubric = _rubric(record, problems)
    images = record.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        problems.append(f"images = {images!r}: must be a list of file names")
        images = []
    paths = tuple(folder / image for image in images)
    for index, path in enumerate(paths):
        try:
            load_image(path)
        except ValueError as error:
            problems.append(f"images[{index}]: {error}")
    row = Row(texts["id"], texts["question"], paths, rubric) if rubric is not None and not problems else None
    return row, [f"{name}{problem}" for problem in problems]


def _rubric(record: dict[str, Any], problems: list[str]) -> Rubric | None:
    answers = record.get("answer")
    if not isinstance(answers, list) or not answers:
        answers = [_text(record, "answer", problems)]
    else:
        answers = [_text({"answer": answer}, "answer", problems) for answer in answers]
    if wrong := [answer for answer in answers if answer.count("{") != answer.count("}")]:
        problems.append(f"answer = {wrong[0]!r}: braces do not match, so no \\boxed{{…}} can hold it")
    options = record.get("options", [])
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        problems.append(f"options = {options!r}: must be a list of texts")
    for name in ("tolerance", "threshold"):
        if not isinstance(record.get(name, 0.5), int | float):
            problems.append(f"{name} = {record[name]!r}: must be a number")
    if problems:
        return None
    numbers = {name: float(record[name]) for name in ("tolerance", "threshold") if name in record}
    try:
        return Rubric(tuple(answers), record.get("grader", "exact"), tuple(options), **numbers)
    except ValueError as error:
        problems.append(str(error))
        return None


def _text(record: dict[str, Any], field: str, problems: list[str]) -> str:
    """A field as text (a number is taken as it is written); a missing, empty or other value adds a problem."""
    value = record.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if field not in record:
        problems.append(f"{field}: missing")
    elif not isinstance(value, str) or not value.strip():
        problems.append(f"{field} = {value!r}: must be text that is not empty")
    return value if isinstance(value, str) else ""

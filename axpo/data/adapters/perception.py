"""Benchmarks of perception: V*, VisualProbe (hard), HR-Bench 4K and 8K."""

from pathlib import Path
from typing import Any

from axpo.data.adapters.fields import lettered, options_of, pictures, take, words


def vstar(record: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """test_questions.jsonl: image (path), text with its options (A) …, category, label, question_id."""
    question = words(take(record, "text"))
    return {
        "id": f"vstar/{take(record, 'category')}/{take(record, 'question_id')}",
        "question": question,
        "images": pictures(take(record, "image"), folder),
        "answer": take(record, "label"),
        "grader": "choice",
        "options": options_of(question),
        "meta": {"category": record.get("category")},
    }


def visualprobe(record: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """val.json: images (paths from the folder above, or its own), problem, solution, doc_id; a judge compares.

    These are what training code for it reads (copies have `question`, `answer`); its card names no features.
    """
    paths = take(record, "images", "image")
    paths = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    return {
        "id": f"visualprobe/{record.get('doc_id') or record.get('question_id') or number}",
        "question": words(take(record, "problem", "question")),
        "images": [_beside(path, folder) for path in paths],
        "answer": take(record, "solution", "answer"),
        "grader": "judge",
    }


def _beside(name: str, folder: Path) -> Path:
    return folder.parent / name if not (folder / name).exists() and (folder.parent / name).exists() else folder / name


def hrbench(record: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """index, question, A, B, C, D, answer (a letter), category, cycle_category, image (base64): its features.

    Every question is there four times with its options in turn, each with an index of its own.
    """
    options = [str(take(record, letter)) for letter in "ABCD"]
    return {
        "id": f"hrbench/{take(record, 'index')}",
        "question": f"{words(take(record, 'question'))}\n{lettered(options)}",
        "images": pictures(take(record, "image"), folder),
        "answer": take(record, "answer"),
        "grader": "choice",
        "options": options,
        "meta": {"category": record.get("category"), "cycle": record.get("cycle_category")},
    }

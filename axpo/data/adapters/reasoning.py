"""Benchmarks of reasoning: MathVision (mini), DynaMath, Math-VR."""

from pathlib import Path
from typing import Any

from axpo.data.adapters.fields import FieldError, graded, lettered, pictures, take, unboxed, words


def mathvision(record: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """id, question, options, image (path), decoded_image, answer, level, subject: the card's features.

    Options that are bare letters name what the picture shows: a choice without texts.
    """
    question, answer = words(take(record, "question")), unboxed(take(record, "answer"))
    options = [str(option) for option in record.get("options") or []]
    if any(option.strip() != chr(ord("A") + index) for index, option in enumerate(options)):
        question = f"{question}\n{lettered(options)}"
        rubric: dict[str, Any] = {"answer": answer, "grader": "choice", "options": options}
    else:
        rubric = {"answer": answer, "grader": "choice" if options else "math"}
    return {
        "id": f"mathvision/{take(record, 'id')}",
        "question": question,
        "images": pictures(take(record, "decoded_image", "image"), folder),
        **rubric,
        "meta": {"level": record.get("level"), "subject": record.get("subject")},
    }


def dynamath(record: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """id, question, image (path), decoded_image, ground_truth, answer_type, subject, knowledge_level: the card's.

    answer_type is "float" (right to 0.1 %, where the benchmark asks for three decimals), "multiple choice" or "text".
    """
    kind, question = take(record, "answer_type"), words(take(record, "question"))
    answer = unboxed(take(record, "ground_truth"))
    if kind not in ("float", "multiple choice", "text"):
        raise FieldError(f"answer_type = {kind!r}: it must be 'float', 'multiple choice' or 'text'")
    rubric: dict[str, Any] = {"answer": answer, "grader": "exact"}
    if kind == "float":
        rubric = {"answer": answer, "grader": "number", "tolerance": 0.001}
    elif kind == "multiple choice":
        rubric = {"answer": answer.strip("(). "), "grader": "choice"}
    return {
        "id": f"dynamath/{take(record, 'id')}",
        "question": question,
        "images": pictures(take(record, "decoded_image", "image"), folder),
        **rubric,
        "meta": {"subject": record.get("subject"), "level": record.get("knowledge_level")},
    }


def math_vr(record: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """question, answer, image or images, id, category.

    Copies of the set show id, question, analysis, answer, category, image; the benchmark's own card names no features,
    so these are not verified. A text-only question has no image.
    """
    question = words(take(record, "question"))
    return {
        "id": f"math-vr/{record.get('id') or number}",
        "question": question,
        "images": pictures(record.get("image") or record.get("images"), folder),
        **graded(unboxed(take(record, "answer")), question),
        "meta": {"category": record.get("category")},
    }

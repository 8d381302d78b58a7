"""Benchmarks of reasoning: MathVision (mini), DynaMath, Math-VR."""

from pathlib import Path
from typing import Any

from axpo.data.adapters.fields import FieldError, graded, lettered, pictures, several, take, unboxed, words


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
    """id, question with <image1> … <image8>, image1 … image8, category, answers, number_of_answers.

    These are what its evaluation code reads. A question with several parts is right when all are: a judge compares.
    The images come before the question, in the order in which it names them.
    """
    question, answers = str(take(record, "question")), several(take(record, "answers", "answer"))
    named = [f"image{index}" for index in range(1, 9) if f"<image{index}>" in question]
    question = words(question)
    if len(answers) == 1 and int(record.get("number_of_answers") or 1) == 1:
        rubric = graded(unboxed(answers[0]), question)
    else:
        rubric = {"answer": "; ".join(answers), "grader": "judge"}
    return {
        "id": f"math-vr/{take(record, 'id')}",
        "question": question,
        "images": pictures([take(record, name) for name in named], folder),
        **rubric,
        "meta": {"category": record.get("category"), "parts": len(answers)},
    }

"""Benchmarks of search: HR-MMSearch and MMSearch, both by F1."""

from pathlib import Path
from typing import Any

from axpo.data.adapters.fields import pictures, several, take, words


def hr_mmsearch(record: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """sample_id, query, query_image, ground_truth, difficulty, category: the card's features."""
    return {
        "id": f"hr-mmsearch/{take(record, 'sample_id')}",
        "question": words(take(record, "query")),
        "images": pictures(take(record, "query_image"), folder),
        "answer": several(take(record, "ground_truth")),
        "grader": "f1",
        "meta": {"difficulty": record.get("difficulty"), "category": record.get("category")},
    }


def mmsearch(record: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """sample_id, query, query_image (none for a question of text), gt_answer, alternative_gt_answers, area, subfield.

    These are its columns, as lmms-eval reads them too.
    """
    others = several(record.get("alternative_gt_answers") or [])
    return {
        "id": f"mmsearch/{take(record, 'sample_id')}",
        "question": words(take(record, "query")),
        "images": pictures(record.get("query_image"), folder),
        "answer": several([take(record, "gt_answer"), *others]),
        "grader": "f1",
        "meta": {"area": record.get("area"), "subfield": record.get("subfield")},
    }

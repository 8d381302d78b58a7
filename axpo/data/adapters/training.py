"""The training sets: ViRL39K, FVQA, PyVision-RL, MMFineReason."""

from pathlib import Path
from typing import Any

from axpo.data.adapters.fields import FieldError, graded, pictures, several, take, unboxed, words


def virl39k(record: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    r"""question, answer in \boxed{}, qid, image (paths below the folder), category, PassRate_*: its card's keys."""
    question, answer = words(take(record, "question")), unboxed(take(record, "answer"))
    rates = {name: value for name, value in record.items() if name.startswith("PassRate") and value is not None}
    return {
        "id": f"virl39k/{take(record, 'qid')}",
        "question": question,
        "images": pictures(record.get("image"), folder),
        **graded(answer, question, free="exact"),
        "meta": {"category": record.get("category"), "source": record.get("source"), **rates},
    }


def fvqa(record: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """prompt (text, or messages), images, reward_model {ground_truth, candidate_answers}, data_id, category.

    candidate_answers is a list written as JSON text. By F1, as the paper does.
    """
    prompt, reward = take(record, "prompt"), take(record, "reward_model")
    if not isinstance(reward, dict) or reward.get("ground_truth") is None:
        raise FieldError(f"reward_model.ground_truth: missing; reward_model is {reward!r:.80}")
    question = prompt
    if isinstance(prompt, list):
        asked = [m.get("content") for m in prompt if isinstance(m, dict) and m.get("role") == "user"]
        if not asked:
            raise FieldError(f"prompt: no message of role 'user' in {prompt!r:.80}")
        question = asked[-1]
    return {
        "id": f"fvqa/{record.get('data_id') or number}",
        "question": words(question),
        "images": pictures(take(record, "images", "image"), folder),
        "answer": several([reward["ground_truth"], *several(reward.get("candidate_answers") or [])]),
        "grader": "f1",
        "meta": {"category": record.get("category"), "source": record.get("data_source")},
    }


def pyvision_rl(record: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """id, question with its options, answer, image_path, ability, data_source: the card's example."""
    question = words(take(record, "question"))
    return {
        "id": f"pyvision-rl/{record.get('data_source')}/{take(record, 'id')}",
        "question": question,
        "images": pictures(take(record, "image_path"), folder),
        **graded(unboxed(take(record, "answer")), question),
        "meta": {"ability": record.get("ability"), "source": record.get("data_source")},
    }


def mmfinereason(record: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """id, source, question, answer, image, pass_rate; ori_question, original_answer, caption, the teacher's response.

    An earlier release has data_source, and in some subsets `solution` for `answer`; the hard ones have a low pass_rate.
    """
    question = words(take(record, "question"))
    source = record.get("source") or record.get("data_source") or ""
    return {
        "id": f"mmfinereason/{source}/{take(record, 'id')}",
        "question": question,
        "images": pictures(take(record, "image"), folder),
        **graded(unboxed(take(record, "answer", "solution")), question),
        "meta": {"source": source, "pass_rate": record.get("pass_rate")},
    }

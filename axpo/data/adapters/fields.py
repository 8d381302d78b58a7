"""What the adapters share: taking fields by name, and telling which grader an answer needs."""

import ast
import base64
import binascii
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_IMAGE_TAG = re.compile(r"<image\s*\d*>\s*", re.IGNORECASE)
_DIRECTLY = re.compile(r"\s*Answer with the option'?s? letter[^.]*\.?\s*$", re.IGNORECASE)
_OPTION = re.compile(r"^\s*\(?([A-Z])[).:]\s*(.+?)\s*$", re.MULTILINE)
_BOXED = re.compile(r"^\s*\$*\s*\\boxed\{(.*)\}\s*\$*\s*$", re.DOTALL)
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{3,}\b")


class FieldError(ValueError):
    """A published record lacks a field, or it holds something else than was published."""


def take(record: dict[str, Any], *names: str) -> Any:
    """The first of these fields that has a value; FieldError names them and the fields there are."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise FieldError(f"{' or '.join(names)}: missing; the record has {', '.join(record) or 'no field'}")


def pictures(value: Any, folder: Path) -> list[Path | bytes]:
    """Images as rows take them, from how they are published: bytes, {bytes, path}, base64, paths, lists of these."""
    if value is None:
        return []
    if isinstance(value, list) and value and all(isinstance(byte, int) for byte in value):
        return [bytes(value)]  # as some Parquet writers store binary
    if isinstance(value, list):
        return [picture for one in value for picture in pictures(one, folder)]
    if isinstance(value, dict):
        return pictures(value.get("bytes") or value.get("path"), folder)
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, str) and value:
        return [_decoded(value) or folder / value]
    raise FieldError(f"an image is {type(value).__name__}; it must be a path, bytes, or base64")


def _decoded(text: str) -> bytes | None:
    """The bytes of base64 text; None for what is rather a path."""
    text = text.partition(";base64,")[2] or text
    if len(text) < 64 or "." in text[-6:]:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def words(text: Any) -> str:
    """A question without image tags, and without the request for a bare letter, which ours replaces."""
    return _DIRECTLY.sub("", _IMAGE_TAG.sub("", str(text))).strip()


def unboxed(answer: Any) -> str:
    r"""An answer without the \boxed{…} around all of it."""
    text = str(answer).strip()
    found = _BOXED.match(text)
    return found[1].strip() if found else text


def several(value: Any) -> list[str]:
    """Answers: a list, or one written as JSON or Python text, or a single answer; duplicates and empty ones go."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(value)
                break
            except (ValueError, SyntaxError):
                continue
    values = value if isinstance(value, list | tuple) else [value]
    return list(dict.fromkeys(str(one).strip() for one in values if one is not None and str(one).strip()))


def lettered(options: Sequence[str]) -> str:
    """Options as lines "A. …"."""
    return "\n".join(f"{chr(ord('A') + index)}. {option}" for index, option in enumerate(options))


def options_of(question: str) -> list[str]:
    """The texts of the options that a question lists as (A) …, A. … or A: …, a line each; [] when it lists none."""
    found = _OPTION.findall(question)
    letters = "".join(letter for letter, _ in found)
    return [text for _, text in found] if letters and letters == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(letters)] else []


def graded(answer: str, question: str = "", *, free: str = "judge") -> dict[str, Any]:
    """answer, grader and options: a letter is a choice, what has no word is mathematics, the rest `free`."""
    letter = answer.strip("(). ")
    options = options_of(question)
    if len(letter) == 1 and "A" <= letter <= (chr(ord("A") + len(options) - 1) if options else "J"):
        return {"answer": letter, "grader": "choice", "options": options}
    plain = re.sub(r"\\[A-Za-z]+|\\text\{[^}]*\}", " ", answer)
    return {"answer": answer, "grader": free if _WORD.search(plain) else "math"}

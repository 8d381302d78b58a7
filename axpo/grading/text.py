"""Answers that are words: exact match, multiple choice, token F1, ANLS."""

import re
import string
from collections import Counter
from collections.abc import Iterable

from rapidfuzz.distance import Levenshtein

from axpo.grading.answer import normalise

_LONGEST = 1000  # characters; a longer answer is none
_CHOICE = re.compile(r"\(?([A-Za-z])\)?(?:[.:)]\s*|\s+|$)(.*)", re.DOTALL)
FONT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact(given: str, answers: Iterable[str]) -> float:
    return float(normalise(given) in {normalise(answer) for answer in answers})


def choice(given: str, answers: Iterable[str], options: tuple[str, ...] = ()) -> float:
    """1.0 for the letter alone ("B", "(B)", "B."), the letter with its own option's text, or that text alone."""
    letters = {answer.strip().strip("().").upper() for answer in answers}
    right = {normalise(options[ord(letter) - ord("A")]) for letter in letters} if options else set()
    text = FONT.sub(r"\1", given.replace("$", "")).strip()
    if normalise(text) in right:
        return 1.0
    match = _CHOICE.fullmatch(text)
    if match is None or match[1].upper() not in letters:
        return 0.0
    letter, rest = match[1].upper(), match[2].strip()
    if not rest:
        return 1.0
    return float(bool(options) and normalise(rest) == normalise(options[ord(letter) - ord("A")]))


def f1(given: str, answers: Iterable[str]) -> float:
    """Token F1 of the best answer (SQuAD, arXiv 1606.05250): without case, punctuation and articles."""
    return max(_f1(_words(given), _words(answer)) for answer in answers)


def anls(given: str, answers: Iterable[str]) -> float:
    """Normalised Levenshtein similarity of the best answer; below 0.5 it is 0 (ST-VQA, arXiv 1905.13648)."""
    text = " ".join(given.casefold().split())
    if len(text) > _LONGEST:
        return 0.0
    best = max(Levenshtein.normalized_similarity(text, " ".join(answer.casefold().split())) for answer in answers)
    return best if best >= 0.5 else 0.0


def _words(text: str) -> list[str]:
    words = text[: 10 * _LONGEST].casefold().translate(_PUNCTUATION).split()
    return [word for word in words if word not in ("a", "an", "the")]


def _f1(given: list[str], answer: list[str]) -> float:
    if not given or not answer:
        return float(given == answer)
    same = sum((Counter(given) & Counter(answer)).values())
    return 2 * same / (len(given) + len(answer))

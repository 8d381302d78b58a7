"""The embedded reasoning task: sums that a small model cannot do in its head, in figures or in words."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from axpo.tasks import Question, Split
from axpo.tasks.splits import GeneratedTask, is_heldout

MOST_PRIMES = 300


@dataclass(frozen=True, slots=True)
class Problem:
    """`expression`: the Python that the answer is the value of, after `imports`; it also says which split asks it."""

    text: str
    expression: str
    answer: int
    easy: bool = False
    imports: str = ""


class ReasoningTask(GeneratedTask):
    """Questions from (split, index) alone; held-out ones have expressions that training never asks.

    easy_share: the share of questions that need no tool.
    `meta` of a question: `family`, `easy` and the `expression` and `imports` of its problem.
    """

    name = "reasoning"
    key = 20_260_701

    def __init__(self, train_size: int = 20_000, heldout_size: int = 1_024, easy_share: float = 0.35):
        super().__init__(train_size, heldout_size, easy_share=easy_share)
        self._easy_share = easy_share

    def question(self, split: Split, index: int) -> Question:
        rng = self.random(split, index)
        make = _easy if rng.random() < self._easy_share else _MAKERS[rng.integers(len(_MAKERS))]
        problem = make(rng)
        while is_heldout(problem.expression) != (split == "heldout"):
            problem = make(rng)
        meta: dict[str, Any] = {"family": "reasoning", "easy": problem.easy}
        return Question(
            id=f"{self.name}/{split}/{index}",
            messages=[{"role": "user", "content": problem.text}],
            images=[],
            answer=str(problem.answer),
            meta=meta | {"expression": problem.expression, "imports": problem.imports},
        )

    def content_hash(self, split: Split) -> str:
        """Of the parameters and of the first questions: the rest are drawn by the same program."""
        sample = [self.question(split, index) for index in range(min(self.size(split), 256))]
        parts = (self.name, split, self.key, self.size(split), self._easy_share, [(q.text, q.answer) for q in sample])
        return hashlib.sha256(repr(parts).encode()).hexdigest()


OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
}
_NOTHING = (("+", 0), ("-", 0), ("*", 1), ("//", 1))
STORIES = {
    "+": (
        "There are {a} birds in a tree and {b} more come. How many are there?",
        "A farm has {a} cows and {b} sheep. How many animals are there?",
    ),
    "-": (
        "There are {a} apples and {b} are eaten. How many are left?",
        "A book has {a} pages and {b} are read. How many are left?",
    ),
    "*": (
        "There are {a} boxes with {b} pens each. How many pens are there?",
        "A hall has {a} rows with {b} seats each. How many seats are there?",
    ),
    "//": ("There are {a} eggs and {b} fill a box. How many boxes are full?",),
    "%": ("There are {a} eggs and {b} fill a box. How many eggs are left?",),
}
DIRECT = "What is {}?"
DIGITS = "What is the sum of the digits of {}?"
PRIMES = "How many primes are below {}?"
DIVISOR = "What is the greatest common divisor of {} and {}?"


def _number(rng: np.random.Generator, digits: int) -> int:
    """One with so many digits."""
    return int(rng.integers(10 ** (digits - 1), 10**digits))


def _easy(rng: np.random.Generator) -> Problem:
    """Two one-digit numbers, or a number that nothing is done to."""
    if rng.random() < 0.5:
        a, b = map(int, rng.integers(0, 10, size=2))
        operator = "+*"[rng.integers(2)] if a < b else "+-*"[rng.integers(3)]
    else:
        a, (operator, b) = _number(rng, int(rng.integers(2, 5))), _NOTHING[rng.integers(len(_NOTHING))]
    expression = f"{a}{operator}{b}"
    return Problem(DIRECT.format(expression), expression, OPERATIONS[operator](a, b), easy=True)


def _pair(rng: np.random.Generator) -> tuple[str, int, int]:
    """An operator and two numbers for it; no result is below zero, divisors are small."""
    operator = list(OPERATIONS)[rng.integers(len(OPERATIONS))]
    first = _number(rng, int(rng.integers(2, 5)))
    second = _number(rng, int(rng.integers(2, 4)) if operator in "+-*" else 2)
    return operator, *((first, second) if operator != "-" else (max(first, second), min(first, second)))


def _two_numbers(rng: np.random.Generator) -> Problem:
    operator, a, b = _pair(rng)
    expression = f"{a}{operator}{b}"
    return Problem(DIRECT.format(expression), expression, OPERATIONS[operator](a, b))


def _three_numbers(rng: np.random.Generator) -> Problem:
    a, b, c = (_number(rng, int(rng.integers(2, 4))) for _ in range(3))
    first, second = ("+*"[rng.integers(2)], "+-"[rng.integers(2)])
    return Problem(
        DIRECT.format(f"{a}{first}{b}{second}{c}"),
        f"{a}{first}{b}{second}{c}",
        OPERATIONS[second](OPERATIONS[first](a, b), c),
    )


def _story(rng: np.random.Generator) -> Problem:
    operator, a, b = _pair(rng)
    forms = STORIES[operator]
    text = forms[rng.integers(len(forms))].format(a=a, b=b)
    return Problem(text, f"{a}{operator}{b}", OPERATIONS[operator](a, b))


def _digit_sum(rng: np.random.Generator) -> Problem:
    number = _number(rng, int(rng.integers(4, 8)))
    return Problem(DIGITS.format(number), f"sum(map(int,str({number})))", sum(map(int, str(number))))


def _primes(rng: np.random.Generator) -> Problem:
    limit = int(rng.integers(10, MOST_PRIMES))
    count = sum(all(n % d for d in range(2, n)) for n in range(2, limit))
    return Problem(PRIMES.format(limit), f"sum(all(n%d for d in range(2,n)) for n in range(2,{limit}))", count)


def _divisor(rng: np.random.Generator) -> Problem:
    common = int(rng.integers(2, 40))
    a, b = (common * int(rng.integers(2, 60)) for _ in range(2))
    return Problem(DIVISOR.format(a, b), f"math.gcd({a},{b})", math.gcd(a, b), imports="import math;")


_MAKERS = (_two_numbers, _two_numbers, _three_numbers, _story, _story, _digit_sum, _primes, _divisor)

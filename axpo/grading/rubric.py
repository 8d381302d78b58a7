"""How a question's answer is compared."""

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["exact", "choice", "number", "math", "f1", "anls", "judge"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Rubric:
    """What is right, and how near an answer must come to it.

    answers: right answers; the best match counts. options: texts of a multiple choice, A first; may be empty.
    tolerance: relative, of "number". threshold: the score of "f1" and "anls" from which the reward is 1.

    Raises:
        ValueError: a value that no answer could satisfy; the message names the field.
    """

    answers: tuple[str, ...]
    kind: Kind = "exact"
    options: tuple[str, ...] = ()
    tolerance: float = 0.01
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"grader = {self.kind!r}: there is {', '.join(KINDS)}")
        if not self.answers or not all(answer.strip() for answer in self.answers):
            raise ValueError(f"answer = {list(self.answers)!r}: it must be text that is not empty")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance = {self.tolerance}: it must be at least 0 and below 1")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold = {self.threshold}: it must be above 0 and at most 1")
        if self.kind == "choice":
            letters = [answer.strip().strip("().").upper() for answer in self.answers]
            last = chr(ord("A") + (len(self.options) or 26) - 1)
            if wrong := [letter for letter in letters if not (len(letter) == 1 and "A" <= letter <= last)]:
                raise ValueError(f"answer = {wrong[0]!r}: grader 'choice' needs a letter from A to {last}")

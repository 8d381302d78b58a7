"""A text and a rubric make a grade."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from axpo.grading import text as words
from axpo.grading.answer import final_answer
from axpo.grading.judge import Judge, JudgeError
from axpo.grading.maths import MathWorkers
from axpo.grading.number import number
from axpo.grading.rubric import Kind, Rubric

if TYPE_CHECKING:
    from axpo.config import JudgeOptions


@dataclass(frozen=True, slots=True)
class Grade:
    """score: 0 to 1, as the benchmark counts. reward: 0 or 1, as training does. error: why it could not be told."""

    score: float
    reward: float
    error: str | None = None


WRONG = Grade(0.0, 0.0)


class Grader:
    """Grades final answers. Thread-safe; holds worker processes and a judge's connection once they are wanted.

    Raises:
        ValueError: a judge is configured whose key is missing.
    """

    def __init__(self, judge: "JudgeOptions | None" = None, math_workers: int = 2):
        self._maths = MathWorkers(math_workers)
        self._judge: Judge | None = None
        if judge is not None and judge.base_url:
            if judge.api_key_env and not os.environ.get(judge.api_key_env):
                raise ValueError(
                    f"judge.api_key_env = {judge.api_key_env!r}: this environment variable is not set; set it, or "
                    "leave judge.api_key_env empty for a service without a key"
                )
            key = os.environ.get(judge.api_key_env, "")
            self._judge = Judge(judge.base_url, judge.model, key, judge.max_calls, judge.cache_dir, judge.timeout_s)

    def check(self, kinds: Iterable[Kind]) -> None:
        """ValueError when it cannot grade by all of them."""
        if "judge" in kinds and self._judge is None:
            raise ValueError("judge.base_url = '': a question has grader 'judge'; set judge.base_url and judge.model")

    def inline(self, rubric: Rubric) -> bool:
        """Whether grading is far quicker than a decode step; else it belongs on a worker thread."""
        return rubric.kind not in ("math", "judge")

    def grade(self, text: str, rubric: Rubric, *, question: str = "", thinking: bool = True) -> Grade:
        r"""Of the `\boxed{…}` in the last `<answer>…</answer>` of a trajectory's text; `final_answer` says which."""
        given = final_answer(text, thinking=thinking)
        return WRONG if given is None or not given.strip() else self.compare(given, rubric, question)

    def compare(self, given: str, rubric: Rubric, question: str = "") -> Grade:
        """Of an answer that stands alone."""
        answers = rubric.answers
        if rubric.kind == "exact":
            return _binary(words.exact(given, answers))
        if rubric.kind == "choice":
            return _binary(words.choice(given, answers, rubric.options))
        if rubric.kind == "number":
            return _binary(max(words.exact(given, answers), number(given, answers, rubric.tolerance)))
        if rubric.kind == "math":
            return _binary(*self._maths.equal(given, answers))
        if rubric.kind == "judge":
            return self._judged(given, rubric, question)
        score = (words.f1 if rubric.kind == "f1" else words.anls)(given, answers)
        return Grade(score, float(score >= rubric.threshold))

    def close(self) -> None:
        self._maths.close()
        if self._judge is not None:
            self._judge.close()

    def _judged(self, given: str, rubric: Rubric, question: str) -> Grade:
        if words.exact(given, rubric.answers):
            return _binary(1.0)
        if self._judge is None:
            return Grade(0.0, 0.0, "no judge is configured")
        try:
            return _binary(float(self._judge.verdict(question, given, rubric.answers)))
        except JudgeError as error:
            return Grade(0.0, 0.0, str(error))


def _binary(score: float, error: str | None = None) -> Grade:
    return Grade(score, score, error)

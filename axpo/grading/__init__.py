"""Outcome reward: is the final answer the right one?"""

from axpo.grading.answer import final_answer, normalise
from axpo.grading.grader import Grade, Grader
from axpo.grading.rubric import KINDS, Kind, Rubric

__all__ = ["KINDS", "Grade", "Grader", "Kind", "Rubric", "final_answer", "normalise"]

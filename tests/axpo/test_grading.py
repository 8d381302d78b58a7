"""Outcome reward: right answers score however they are written, and answers that hedge or hide do not."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo.grading import Grader, Rubric, final_answer, normalise

GRADER = Grader()


def grade(text: str, answer: str, *, thinking: bool = True) -> float:
    return GRADER.grade(text, Rubric((answer,)), thinking=thinking).reward


SCORING = r"<answer>\boxed{7}</answer>"


def turn(visible: str) -> str:
    return f"It shows 7.\n</think>\n\n{visible}<|im_end|>"


def test_the_plain_answer() -> None:
    assert grade(turn(r"<answer>\boxed{7}</answer>"), "7") == 1.0
    assert grade(turn(r"<answer>\boxed{8}</answer>"), "7") == 0.0
    assert grade(turn(r"<answer>The digit is \boxed{7}.</answer>"), "7") == 1.0
    assert grade(turn(r"<answer>\boxed{\frac{1}{2}}</answer>"), r"\frac{1}{2}") == 1.0


@pytest.mark.parametrize(
    "text",
    [
        turn(r"<answer>\boxed{7} or \boxed{8}</answer>"),
        turn(r"<answer>\boxed{8} \boxed{7}</answer>"),
        turn(r"<answer>\boxed{7} \boxed{7}</answer>"),
        turn(r"<answer>\boxed{0,1,2,3,4,5,6,7,8,9}</answer>"),
        turn(r"<answer>\boxed{7 or 1}</answer>"),
        turn(r"<answer>\boxed{\boxed{7}}</answer>"),
        turn(r"<answer>\boxed{7</answer>"),
        turn(r"<answer>\boxed{}</answer>"),
        turn(r"<answer>7</answer>"),
        turn("<answer>\\boxed{\N{FULLWIDTH DIGIT SEVEN}}</answer>"),
        turn("<answer>\\boxed{\N{ARABIC-INDIC DIGIT SEVEN}}</answer>"),
        turn("<answer>\\boxed{7\N{ZERO WIDTH SPACE}}</answer>"),
        turn(r"\boxed{7}"),
        turn(r"<answer>\boxed{7}"),
        turn(r"\boxed{7}</answer>"),
        turn(r"<answer>\boxed{7}</answer><answer>\boxed{8}</answer>"),
        turn(r"<answer>\boxed{7}</answer><answer></answer>"),
        turn(r"<ANSWER>\boxed{7}</ANSWER>"),
        r"<answer>\boxed{7}</answer>",  # the thinking that the prompt opened was never closed
        r"<answer>\boxed{7}</answer></think>",
        r"a</think>b<think><answer>\boxed{7}</answer>",  # thinking opened again
        turn("<tool_call>{}</tool_call>") + "\n<tool_response>\n" + SCORING,  # what a tool said
        turn("<tool_call>{}</tool_call>") + "\n<|im_start|>assistant\n<think>\n" + SCORING,  # thought in a second turn
        "",
    ],
)
def test_answers_that_hedge_or_hide_do_not_score(text: str) -> None:
    assert grade(text, "7") == 0.0


def test_the_last_answer_counts() -> None:
    assert grade(turn(r"<answer>\boxed{8}</answer> no: <answer>\boxed{7}</answer>"), "7") == 1.0
    earlier = "a</think>\n\n<answer>\\boxed{8}</answer><|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert grade(earlier + turn(r"<answer>\boxed{7}</answer>"), "7") == 1.0


def test_a_model_that_does_not_think_is_graded_too() -> None:
    assert grade(r"<answer>\boxed{7}</answer>", "7", thinking=False) == 1.0
    assert grade(r"<think><answer>\boxed{7}</answer>", "7", thinking=False) == 0.0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("7", "7.0"),
        ("7", " 7. "),
        ("07", "7"),
        ("+7", "7"),
        ("-0", "0"),
        ("1,234,567", "1234567"),
        (".50", "0.5"),
        ("Blue", r"\text{blue}"),
        ("$7$", "7"),
        ("two  words", "Two words"),
        ("1" * 5000, "1" * 5000),
    ],
)
def test_ways_to_write_the_same(a: str, b: str) -> None:
    assert normalise(a) == normalise(b)


@pytest.mark.parametrize(
    ("a", "b"), [("7", "70"), ("1,2", "12"), ("-7", "7"), ("0.70", "0.07"), ("1" * 40, "1" * 39 + "2")]
)
def test_ways_to_write_something_else(a: str, b: str) -> None:
    assert normalise(a) != normalise(b)


@given(st.integers(), st.integers())
def test_integers_are_equal_exactly_when_they_are(a: int, b: int) -> None:
    assert grade(turn(rf"<answer>\boxed{{{a}}}</answer>"), str(b)) == float(a == b)
    assert grade(turn(rf"<answer>\boxed{{{a:,}}}</answer>"), str(a)) == 1.0


@given(st.text())
def test_no_text_breaks_it(text: str) -> None:
    assert grade(text, "7") in (0.0, 1.0)
    assert normalise(normalise(text)) == normalise(text)
    assert final_answer(text) is None or isinstance(final_answer(text), str)


@pytest.mark.parametrize(
    "text",
    [
        turn(r"<answer>\boxed{" + "{" * 300_000 + "</answer>"),
        turn(r"<answer>\boxed{" + "1" * 300_000 + "}</answer>"),
        turn(r"<answer>\boxed{" + "1,111" * 60_000 + "}</answer>"),
        turn(r"<answer>\boxed{" + r"\text{" * 50_000 + "}" * 50_001 + "</answer>"),
        turn(r"<answer>\boxed{" + " " * 300_000 + "x}</answer>"),
        "</think>" + "<answer>" * 50_000 + "</answer>" * 50_000,
        "<think></think>" * 30_000,
    ],
    ids=range(7),
)
def test_huge_texts_take_no_time(text: str) -> None:
    start = time.process_time()
    assert grade(text, "7") == 0.0
    assert time.process_time() - start < 2  # work that grows with the square would take minutes

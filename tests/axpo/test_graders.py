# ruff: noqa: E501 - tables
"""Each grader on true and false answers, the adversarial among them: they neither hang nor score."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from axpo.config import JudgeOptions
from axpo.grading import Grader, Rubric
from axpo.grading.maths import MathWorkers

GRADER = Grader()
ANIMALS = ("a cat", "a dog", "an owl", "a fox")
LONG = "x" * 100_000


def reward(given: str, *answers: str, kind: Any, **more: Any) -> float:
    return GRADER.compare(given, Rubric(answers, kind, **more)).reward


@pytest.mark.parametrize(
    "given",
    [
        "B",
        "b",
        "(B)",
        "B.",
        "B)",
        " B ",
        r"\text{B}",
        "$B$",
        "B: a dog",
        "(B) a dog",
        "a dog",
        "A DOG.",
        r"\textbf{B}.",
        r"\text{B) }a dog",
        r"\mathrm{(B)}",
    ],
)
def test_a_choice_that_is_right(given: str) -> None:
    assert reward(given, "B", kind="choice", options=ANIMALS) == 1.0


@pytest.mark.parametrize(
    "given",
    ["A", "AB", "A, B", "A or B", "B or C", "B and C", "not B", "A B C D", "B: a cat", "a cat", "Bee", "", "BB", "[A-D]",
     "a cat a dog an owl a fox", "B a fox", LONG, "B" * 1000, "((((((((((B", "A) B) C) D)", "A. B. C. D.",
     "(A)(B)(C)(D)", "B B", "Ｂ", "【B】", "the answer is B or C", r"\text{B}\text{C}", r"\boxed{B}", "B; C", "B, because"],
)  # fmt: skip
def test_a_choice_that_is_wrong(given: str) -> None:
    assert reward(given, "B", kind="choice", options=ANIMALS) == 0.0


def test_a_choice_without_known_options() -> None:
    assert reward("C.", "C", kind="choice") == 1.0
    assert reward("C. something", "C", kind="choice") == 0.0


NUMBERS = [
    ("42", "42"), ("42.0", "42"), ("42.3", "42"), ("1,200", "1200"), ("1.2e3", "1200"), ("1.2\\times10^{3}", "1,200"),
    ("\\frac{1}{2}", "0.5"), ("1/2", "0.5"), ("-0.5", "-1/2"), ("50%", "0.5"), ("50\\%", "50%"), ("$20", "$20"), ("20", "$20"),
    ("3 cm", "3 cm"), ("30 mm", "3 cm"), ("0.03 m", "3 cm"), ("3", "3 cm"), ("3.2\\text{ km/h}", "3.2 km/h"),
    ("90^\\circ", "90°"), ("2 m^2", "20000 cm^2"), ("\u22125", "-5"),
    ("1 200", "1200"), ("10\\,000", "10000"), ("\\tfrac{3}{4}", "0.75"), ("\\$20", "$20"), ("$20", "20"), ("$20$", "20"), ("$\\$20$", "$20"), ("-$20", "-20"),
    ("-0", "0"), ("0/5", "0"), (".5", "0.5"), ("5.", "5"), ("100\\%", "1"), ("68 km/h", "68 km/h"), ("7 days", "168 hours"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "answer"), NUMBERS)
def test_a_number_that_is_right(given: str, answer: str) -> None:
    assert reward(given, answer, kind="number") == 1.0


@pytest.mark.parametrize(
    ("given", "answer"),
    [("43", "42"), ("-42", "42"), ("42 or 43", "42"), ("41 42", "42"), ("41,42", "42"), ("40-44", "42"), ("42, 43", "42"),
     ("3 kg", "3 cm"), ("3 m", "3 cm"), ("3 cm", "3"), ("9**9**9", "42"), ("1e999", "42"), ("1/0", "42"), ("nan", "42"),
     ("inf", "42"), ("__import__('os')", "42"), ("", "42"), ("4" * 99, "42"), (LONG, "42"), ("42 m**999999999", "42 m"),
     ("\u0664\u0662", "42"), ("4 2", "42"), ("4\\,2", "42"), ("4 . 2", "4.2"), ("3 4/5", "34/5"), ("$20", "€20"), ("€20", "20"), ("12,34,567", "1234567"),
     ("1,23", "123"), ("--5", "5"), ("½", "0.5"), ("²", "2"), ("1_000", "1000"), ("0x10", "16"), ("x=3", "3"), ("[1,2]", "1"), ("68°F", "20 °C"), ("45", "45%")],
)  # fmt: skip
def test_a_number_that_is_wrong(given: str, answer: str) -> None:
    assert reward(given, answer, kind="number") == 0.0


def test_the_tolerance_is_relative_and_sharp() -> None:
    rng = random.Random(random.getrandbits(32))
    for _ in range(200):
        wanted, tolerance = rng.uniform(-1e6, 1e6), rng.choice([0.0, 1e-3, 0.05])
        off = rng.uniform(0, 0.1)
        expected = float(off <= tolerance)
        if abs(off - tolerance) > 1e-6:
            given = repr(round(wanted * (1 + off), 9))
            assert reward(given, repr(wanted), kind="number", tolerance=tolerance) == expected, (wanted, off)


@pytest.mark.parametrize(
    ("given", "answer", "f1"),
    [
        ("the Eiffel Tower", "Eiffel tower", 1.0),
        ("Paris, France", "Paris", 2 / 3),
        ("London", "Paris", 0.0),
        ("", "Paris", 0.0),
    ],
)
def test_f1(given: str, answer: str, f1: float) -> None:
    grade = GRADER.compare(given, Rubric((answer,), "f1", threshold=0.7))
    assert grade.score == pytest.approx(f1) and grade.reward == float(f1 >= 0.7)


def test_a_list_of_everything_has_no_f1() -> None:
    everything = " ".join(["Paris", "London", "Rome", "Madrid"] * 50)
    assert GRADER.compare(everything, Rubric(("Paris", "London"), "f1")).reward == 0.0


@pytest.mark.parametrize(
    ("given", "answer", "anls"),
    [("Hello", "hello", 1.0), ("helo", "hello", 0.8), ("goodbye", "hello", 0.0), (LONG, "hello", 0.0)],
)
def test_anls(given: str, answer: str, anls: float) -> None:
    assert GRADER.compare(given, Rubric(("nothing like it", answer), "anls")).score == pytest.approx(anls)


@pytest.fixture(scope="module")
def maths() -> Iterator[MathWorkers]:
    workers = MathWorkers(2)
    yield workers
    workers.close()


@pytest.mark.parametrize(
    ("given", "answer", "equal"),
    [("\\frac{1}{2}", "0.5", 1.0), ("2\\sqrt{3}", "\\sqrt{12}", 1.0), ("x^2+2x+1", "(x+1)^2", 1.0), ("\\{1,2\\}", "\\{2,1\\}", 1.0),
     ("(1, 2)", "(1,2)", 1.0), ("B", "B", 1.0), ("12:30", "12:30", 1.0), ("\\frac{1}{3}", "0.5", 0.0), ("x+1", "x+2", 0.0),
     ("12:45", "12:30", 0.0), ("C", "B", 0.0), ("\\{1,2,3,4,5\\}", "5", 0.0), ("42 or 43", "42", 0.0), ("5, 6", "5", 0.0),
     ("\\text{all of the above}", "5", 0.0),
     ("7\\\\8", "7", 0.0), ("8 & 7", "7", 0.0), ("7\\]\\[8", "7", 0.0), ("7=8=9", "7", 0.0), ("\\{7\\} \\cup \\{8\\}", "7", 0.0), ("7 \\lor 8", "7", 0.0),
     ("(1,2]", "[1,2]", 0.0), ("[1,2]", "[1,2]", 1.0), ("(2,1)", "(1,2)", 0.0), ("-0", "0", 1.0), ("3\\text{ or }4", "3", 0.0), ("\\pm 3", "3", 0.0),
     ("-\\infty", "\\infty", 0.0), ("x>3", "x<3", 0.0), ("3>x", "x<3", 1.0), ("\u0664", "4", 0.0), ("\\input{/etc/passwd}", "7", 0.0),
     ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", 1.0), ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\3\\end{pmatrix}", 0.0), ("\\frac{", "5", 0.0), ("", "5", 0.0)],
)  # fmt: skip
def test_mathematical_equality(maths: MathWorkers, given: str, answer: str, equal: float) -> None:
    assert maths.equal(given, [answer], timeout=60)[0] == equal


@pytest.mark.parametrize(
    "given",
    ["9^{9^{9^9}}", "9^9^9^9", "(" * 390, "\\sqrt" * 80, "\\frac{1}{" * 40 + "1" + "}" * 40, "10^{10^{10}}!", LONG,
     "\\sum_{n=1}^{10^9} n^n", "{" * 200 + "}" * 200],
)  # fmt: skip
def test_bombs_neither_hang_nor_score_nor_stop_the_workers(maths: MathWorkers, given: str) -> None:
    begun = time.monotonic()
    score, _ = maths.equal(given, ["7"], timeout=1.5)
    assert score == 0.0 and time.monotonic() - begun < 30
    assert maths.equal("\\frac{14}{2}", ["7"], timeout=60) == (1.0, None)


def test_rubrics_that_nothing_could_satisfy_are_refused() -> None:
    for arguments, told in (
        ((("x",), "guess"), "grader = 'guess'"),
        (((), "exact"), "answer = "),
        (((" ",), "exact"), "answer = "),
        ((("E",), "choice", ("a", "b")), "a letter from A to B"),
        ((("AB",), "choice"), "a letter from A to Z"),
        ((("1",), "number", (), 1.5), "tolerance = 1.5"),
        ((("1",), "f1", (), 0.1, 0.0), "threshold = 0"),
    ):
        with pytest.raises(ValueError, match=told):
            Rubric(*arguments)  # type: ignore[arg-type]


class Service:
    """An OpenAI-compatible server: `says(number)` is (status, content of the message)."""

    def __init__(self) -> None:
        service = self
        self.bodies: list[dict[str, Any]] = []
        self.says: Callable[[int], tuple[int, str]] = lambda number: (200, "CORRECT")

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                service.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                status, text = service.says(len(service.bodies))
                content = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.server.shutdown()
    service.server.server_close()


def judged(service: Service, tmp_path: Path, **more: Any) -> Grader:
    return Grader(JudgeOptions(base_url=service.url, model="m", cache_dir=str(tmp_path), **more))


def test_the_judge_is_asked_once_and_only_where_words_differ(service: Service, tmp_path: Path) -> None:
    grader, rubric = judged(service, tmp_path), Rubric(("a red fox",), "judge")
    assert grader.compare("A red fox.", rubric, "What is it?").reward == 1.0 and not service.bodies
    for _ in range(3):
        assert grader.compare("Vulpes vulpes", rubric, "What is it?").reward == 1.0
    (body,) = service.bodies
    asked = json.loads(body["messages"][1]["content"])
    assert asked == {"question": "What is it?", "references": ["a red fox"], "answer": "Vulpes vulpes"}
    assert body["model"] == "m" and body["temperature"] == 0
    service.says = lambda number: (200, "INCORRECT")
    assert grader.compare("a wolf", rubric, "What is it?").reward == 0.0
    grader.close()


@pytest.mark.parametrize("said", ["Perhaps.", "CORRECT or INCORRECT", "", "The answer is UNCORRECTABLE"])
def test_a_judge_that_answers_nonsense_is_asked_again_and_counted(service: Service, tmp_path: Path, said: str) -> None:
    service.says = lambda number: (200, said)
    grade = judged(service, tmp_path).compare("x", Rubric(("y",), "judge"))
    assert grade.reward == 0.0 and "the judge said" in (grade.error or "") and len(service.bodies) == 3


def test_outages_and_budget(service: Service, tmp_path: Path) -> None:
    service.says = lambda number: (503, "") if number == 1 else (200, "correct")
    grader = judged(service, tmp_path, max_calls=2)
    assert grader.compare("x", Rubric(("y",), "judge")).reward == 1.0
    grade = grader.compare("z", Rubric(("y",), "judge"))
    assert grade.reward == 0.0 and "judge.max_calls" in (grade.error or "") and len(service.bodies) == 2
    assert grader.compare("x", Rubric(("y",), "judge")).reward == 1.0, "a known verdict is free"


def test_a_judge_that_is_missing_or_has_no_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"judge.base_url = ''"):
        Grader().check({"exact", "judge"})
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match="NO_SUCH_KEY"):
        Grader(JudgeOptions(base_url="http://x/v1", model="m", api_key_env="NO_SUCH_KEY"))
    with pytest.raises(ValueError, match=r"judge.model = ''"):
        JudgeOptions(base_url="http://x/v1")

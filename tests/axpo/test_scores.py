"""Pass@k against every subset, the spread over repeats, and tool use."""

import random
from itertools import combinations
from statistics import stdev
from typing import Any

import pytest

from axpo.scores import pass_at_k, scores, scores_table


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples: int):
    for right in range(samples + 1):
        hits = [1] * right + [0] * (samples - right)
        for k in range(1, samples + 1):
            subsets = list(combinations(hits, k))
            assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased():
    """The mean over draws of n samples of a question that is solved with chance p is 1 - (1 - p)^k."""
    rng, p, n, k = random.Random(5), 0.3, 6, 4
    draws = [pass_at_k(n, sum(rng.random() < p for _ in range(n)), k) for _ in range(20_000)]
    assert sum(draws) / len(draws) == pytest.approx(1 - (1 - p) ** k, abs=0.01)


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_impossible_counts_are_refused(samples: int, right: int, k: int):
    with pytest.raises(ValueError, match=f"Pass@{k} of {samples} samples"):
        pass_at_k(samples, right, k)


def line(repeat: int, doc: int, hit: int, tool: bool = False, **more: Any) -> dict[str, Any]:
    return {"repeat": repeat, "doc_id": doc, "hit": hit, "score": float(hit), "used_tool": tool, "error": None, **more}


def test_scores_of_two_repeats():
    lines = [
        *(line(0, 0, hit, tool) for hit, tool in ((1, True), (0, True), (0, False), (0, False))),
        *(line(0, 1, hit) for hit in (1, 1, 1, 1)),
        *(line(1, 0, 0) for _ in range(4)),
        *(line(1, 1, hit, True) for hit in (0, 0, 1, 1)),
    ]
    lines[-1] |= {"score": 0.5, "error": "no judge is configured"}
    one = scores(lines, k=2)
    assert (one.questions, one.samples, one.repeats, one.k, one.errors) == (2, 4, 2, 2, 1)
    assert one.pass_1 == pytest.approx((7 / 16 + 0.0, stdev([5 / 8, 2 / 8])))
    first, second = (pass_at_k(4, 1, 2) + 1) / 2, pass_at_k(4, 2, 2) / 2
    assert one.pass_k == pytest.approx(((first + second) / 2, stdev([first, second])))
    assert one.score == pytest.approx(6.5 / 16)
    assert (one.tool_rate, one.tool_accuracy, one.no_tool_accuracy) == pytest.approx((6 / 16, 3 / 6, 4 / 10))


def test_the_table_has_a_row_a_benchmark_and_their_average():
    always = scores([line(r, d, 1) for r in range(2) for d in range(3) for _ in range(4)], k=4)
    half = scores([line(0, d, d % 2, True) for d in range(4) for _ in range(4)], k=4)
    table = scores_table({"easy": always, "half": half}, "model")
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["easy", "half", "average"] and cells[1] == ["3", "4", ""]
    assert cells[2] == ["100.0 ± 0.0", "50.0", "75.0"] and cells[4] == ["0.0%", "100.0%", "50.0%"]
    assert cells[5] == ["–", "50.0%", ""] and cells[6] == ["100.0%", "–", ""]

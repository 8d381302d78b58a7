"""Pass@k against every subset, the spread over repeats, tool use, and averages by family."""

import random
from itertools import combinations
from statistics import stdev
from typing import Any

import pytest

from axpo.scores import average, pass_at_k, scores, scores_sheet, spread, tools_sheet


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


def line(repeat: int, doc: int, hit: int, *tools: str | None, **more: Any) -> dict[str, Any]:
    own = {"used_tool": bool(tools), "tools": list(tools), "error": None}
    return {"repeat": repeat, "doc_id": doc, "hit": hit, "score": float(hit), **own, **more}


def test_scores_of_two_repeats():
    first: list[tuple[Any, ...]] = [(1, "python", "python"), (0, "python"), (0,), (0,)]
    last: list[tuple[Any, ...]] = [(0, None), (0, "zoom"), (1, "zoom"), (1, "zoom", "python")]
    lines = [
        *(line(0, 0, *given) for given in first),
        *(line(0, 1, hit) for hit in (1, 1, 1, 1)),
        *(line(1, 0, 0) for _ in range(4)),
        *(line(1, 1, *given) for given in last),
    ]
    lines[-1] |= {"score": 0.5, "error": "no judge is configured"}
    one = scores(lines, 2, "reasoning")
    assert (one.questions, one.samples, one.repeats, one.k, one.errors) == (2, 4, 2, 2, 1)
    assert one.pass_1 == pytest.approx((5 / 8, 2 / 8))
    assert spread(one.pass_1) == pytest.approx((7 / 16, stdev([5 / 8, 2 / 8])))
    assert one.pass_k == pytest.approx(((pass_at_k(4, 1, 2) + 1) / 2, pass_at_k(4, 2, 2) / 2))
    assert one.score == pytest.approx(6.5 / 16)
    assert (one.tool_rate, one.tool_accuracy, one.no_tool_accuracy) == pytest.approx((6 / 16, 3 / 6, 4 / 10))
    assert {name: (use.rate, use.accuracy) for name, use in one.tools.items()} == {
        "malformed": (1 / 16, 0.0),
        "python": (3 / 16, 2 / 3),  # two calls of a sample count once
        "zoom": (3 / 16, 2 / 3),
    }


def always(family: str) -> Any:
    return scores([line(r, d, 1) for r in range(2) for d in range(3) for _ in range(4)], 4, family)


def half(family: str) -> Any:
    """All right in the first repeat, all wrong in the second."""
    return scores([line(r, d, 1 - r, "python") for r in range(2) for d in range(4) for _ in range(4)], 4, family)


def test_the_table_has_families_their_benchmarks_and_the_average_over_these():
    made = {"a": always("reasoning"), "search": half("search"), "b": half("reasoning")}
    cells = scores_sheet(made, "model").rows
    assert [row[0] for row in cells] == ["reasoning", "  a", "  b", "search", "average"]
    assert [row[1] for row in cells] == ["", "3", "4", "4", ""]
    deviation = 100 * stdev([1, 0])
    assert cells[1][2] == "100.0 ± 0.0" and cells[2][2] == f"50.0 ± {deviation:.1f}" == cells[3][2]
    # Averages are formed in each repeat: 1 and 0.5; 1 and 1/3.
    assert (
        cells[0][2] == f"75.0 ± {100 * stdev([1, 0.5]):.1f}" and cells[4][2] == f"66.7 ± {100 * stdev([1, 1 / 3]):.1f}"
    )
    assert [row[4] for row in cells] == ["50.0%", "0.0%", "100.0%", "100.0%", "66.7%"]
    assert [row[5:] for row in cells[:3]] == [["", ""], ["–", "100.0%"], ["50.0%", "–"]]
    assert average([made["a"], made["b"]]).pass_1 == pytest.approx((1.0, 0.5))
    assert tools_sheet(made).rows == [["a", "–"], ["search", "100.0% / 50.0%"], ["b", "100.0% / 50.0%"]]


def test_a_sheet_in_markdown():
    text = scores_sheet({"a|b": always("reasoning")}, "model").markdown().splitlines()
    assert text[0] == "**model: 4 samples a question, 2 times**" and text[3].count("---:") == 6
    assert text[-1].startswith("| &nbsp;&nbsp;a\\|b | 3 | 100.0 ± 0.0 |")

"""Which resampled calls ask for the same: pairs that must and must not be one cluster, and single links."""

import random
from dataclasses import replace
from typing import Any

import pytest

from axpo.call_clusters import SAME_BOX, call_clusters, exact_key, overlap
from axpo.trajectory import ToolCall, Trajectory
from tests.axpo.factory import random_group, random_resamples


def calling(name: str | None, arguments: dict[str, Any] | None, index: int = 0) -> Trajectory:
    """A resample whose call, behind its fork, is this one."""
    rng = random.Random(index)
    source = random_group(random.Random(3), size=1, tool_rate=1.0)[0]
    made = random_resamples(rng, source, 1)[0]
    call = replace(made.tool_calls[0], name=name, arguments=arguments)
    return replace(made, id=f"{index}", tool_calls=[call, *made.tool_calls[1:]])


def sizes(*calls: tuple[str | None, dict[str, Any] | None]) -> list[int]:
    return [len(cluster) for cluster in call_clusters([calling(*call, i) for i, call in enumerate(calls)])]


def code(text: str) -> tuple[str, dict[str, Any]]:
    return "python", {"code": text}


def query(text: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "tavily-search", {"query": text, **more}


def box(*edges: float, **more: Any) -> tuple[str, dict[str, Any]]:
    return "image_zoom_in", {"bbox_2d": list(edges), "label": "x", **more}


SAME = [
    (query("Who wrote  Faust?"), query("who wrote faust?")),
    (query('the "Big Bang"'), query("the Big Bang")),
    (query("caf\u00e9"), query("cafe\u0301")),
    (query("x", max_results=5), query("x", max_results=5.0)),
    (code("x = 1\nprint(x)"), code("# first\nx=1 # one\n\nprint( x )")),
    (code("print(2.0 * 3)"), code("print(2 * 3.0)")),
    (code("print('a')"), code('print("a")')),
    (code("for in"), code("for  in")),
    (box(0, 0, 100, 100), box(10, 0, 100, 100, label="another word")),
    (box(0, 0, 9, 9, img_idx=0), box(0, 0, 9, 9)),
]
DIFFERENT = [
    (query("Faust"), query("Goethe")),
    (query("x", max_results=5), query("x", max_results=6)),
    (query("x"), ("image_search", {"query": "x"})),
    (code("print(1)"), code("print(2)")),
    (code("print('3')"), code("print(3)")),
    (code("print(12345678901234567)"), code("print(12345678901234568)")),
    (code("if a:\n  b\nc"), code("if a:\n  b\n  c")),
    (code("for in"), code("while in")),
    (box(0, 0, 100, 100), box(60, 0, 160, 100)),
    (box(0, 0, 100, 100), box(0, 0, 100, 100, img_idx=1)),
    (box(0, 0, 0, 100), box(0, 0, 0, 200)),
    (box(0, 0, 100, 100), (None, None)),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_same(first, second):
    assert sizes(first, second) == [2]


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_different(first, second):
    assert sizes(first, second) == [1, 1]


def test_links_are_single():
    """A chain of boxes is one cluster though its ends do not touch; what no link reaches is another."""
    chain = [box(30 * i, 0, 30 * i + 100, 100) for i in range(5)]
    assert overlap(chain[0][1]["bbox_2d"], chain[1][1]["bbox_2d"]) >= SAME_BOX
    assert overlap(chain[0][1]["bbox_2d"], chain[4][1]["bbox_2d"]) == 0
    assert sizes(*chain) == [5]
    order = [0, 4, 1, 3, 2]
    assert sizes(*(chain[i] for i in order), box(500, 0, 600, 100)) == [5, 1]
    assert sizes(*(chain[i] for i in order if i != 2)) == [2, 2], "without the middle one there is no link"


def test_malformed_calls_are_what_was_sampled():
    first, second = calling(None, None, 0), calling(None, None, 1)
    again = replace(first, id="again")
    assert sorted(map(len, call_clusters([first, second, again]))) == [1, 2]


def test_what_made_no_call_behind_the_fork_is_not_counted():
    source = random_group(random.Random(3), size=1, tool_rate=1.0)[0]
    first = source.tool_calls[0]
    made = random_resamples(random.Random(0), source, 8, fork=source.roles.index(1, first.end + 3))
    fork = made[0].fork_token or 0
    calls = [t for t in made if len(t.tool_calls) > len([c for c in source.tool_calls if c.end <= fork])]
    assert 0 < len(calls) < 8
    assert sum(map(len, call_clusters(made))) == len(calls)
    assert call_clusters([]) == []


def test_equal_calls_are_one_cluster_and_written_differently_two_keys():
    one, other = calling(*query("A b"), 0), calling(*query("a  B"), 1)
    assert exact_key(one, one.tool_calls[0]) != exact_key(other, other.tool_calls[0])
    assert len(call_clusters([one, other])) == 1
    assert isinstance(one.tool_calls[0], ToolCall)

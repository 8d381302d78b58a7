"""Latency, errors and timeouts of each tool, and the state that a tool has where a continuation goes on."""

import json
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from axpo.branch import Branch, Limits
from axpo.calls import TurnCalls
from axpo.conversation import Conversation
from axpo.diagnostics import tool_metrics
from axpo.rollout import Agent
from axpo.tasks import Question, get_task
from axpo.tools import Tool, ToolResult
from axpo.tools.python import Python
from axpo.trajectory import PROMPT, ToolCall, Trajectory
from engine import CompletionOutput
from tests.axpo.factory import random_group, random_resamples

LIMITS = Limits(max_turns=9, max_new_tokens=4000, max_tokens=4090)


class Slow(Tool):
    """Takes as long as it is asked to and shows a picture; negative: it breaks."""

    name = "slow"
    description = "Waits."
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"seconds": {"type": "number"}},
        "required": ["seconds"],
    }

    def run(self, arguments: Mapping[str, Any], images: list[Image.Image]) -> ToolResult:
        if arguments["seconds"] < 0:
            raise RuntimeError("it broke")
        time.sleep(arguments["seconds"])
        return ToolResult(True, "", [Image.new("RGB", (32, 32))])


class Brief(Python):
    """The same tool in few words: the embedded model has a context of 1,024 tokens, and spells most letters."""

    description = "Runs code."
    parameters: ClassVar[dict[str, Any]] = {"type": "object"}


@pytest.fixture(scope="module")
def python() -> Iterator[Python]:
    tool = Brief(sandbox="none")
    yield tool
    tool.close()


@pytest.fixture(scope="module")
def question() -> Question:
    return get_task("mini").question("train", 0)


@pytest.fixture(scope="module")
def conversing(agent: Agent, python: Python) -> Agent:
    tools: dict[str, Tool] = {tool.name: tool for tool in (python, Slow())}
    return Agent(agent.llm, Conversation(agent.llm.processor, tools), seed=0)


def opened(agent: Agent, question: Question) -> Branch:
    sequence = agent._open(question, agent.llm.image_inputs(question.images), LIMITS)
    n = len(sequence)
    nothing: list[float | None] = [None] * n
    return Branch(
        "b", 0, question, sequence, 0, list(question.images), n, [PROMPT] * n, nothing[:], nothing[:], turn_start=n
    )


def turn(agent: Agent, branch: Branch, *calls: tuple[str, dict[str, Any]]) -> list[ToolResult]:
    """The branch has sampled these calls; they are run, and what they gave is shown where the context has room."""
    written = "".join(f"\n<tool_call>\n{json.dumps({'name': n, 'arguments': a})}\n</tool_call>" for n, a in calls)
    tokens = [*agent.conversation.processor.encode(f"So.\n</think>\n{written}"), agent.conversation.end_of_turn]
    branch.sequence.extend(tokens)
    known = [-0.1] * len(tokens)
    output = CompletionOutput(0, "", tokens, known, known, "stop", agent.conversation.end_of_turn)
    made = TurnCalls(branch, agent._end_turn(branch, output, LIMITS), agent.conversation.tools, lambda text: text)
    results = made()
    if len(branch.sequence) < 960:
        agent._take([(branch, results)], LIMITS)
        agent.llm.abort(branch.sequence)
    return results


def test_a_continuation_finds_the_interpreter_as_it_was_at_its_fork(conversing: Agent, question: Question) -> None:
    """Kernels cannot be copied: calls before the fork are made again, those behind it are not."""
    source = opened(conversing, question)
    turn(conversing, source, ("python", {"code": "x = [len(_pil_images)]"}), ("slow", {"seconds": 0}))
    turn(conversing, source, ("python", {"code": "x.append(len(_pil_images)); y = 7"}))
    fork = source.turn_start
    turn(conversing, source, ("python", {"code": "x.append('later'); del y"}))
    early, late = (conversing.fork(1, source, at, 1)[0] for at in (source.prompt_len, fork))
    assert (late.turn, late.turn_start, len(late.calls), len(late.images)) == (2, fork, 3, 2)
    assert (early.turn, early.turn_start, len(early.calls), len(early.images)) == (0, source.prompt_len, 0, 1)
    (seen,) = turn(conversing, late, ("python", {"code": "print(x, y, len(_pil_images))"}))
    assert seen.text.strip() == "[1, 2] 7 2"
    (seen,) = turn(conversing, late, ("python", {"code": "x += [3]; print(x)"}))
    assert seen.text.strip() == "[1, 2, 3]", "and its own calls go on from there"
    (seen,) = turn(conversing, early, ("python", {"code": "print(x)"}))
    assert "NameError" in seen.text
    (seen,) = turn(conversing, source, ("python", {"code": "print(x)"}))
    assert seen.text.strip() == "[1, 2, 'later']", "the source has not noticed"
    for branch in (source, early, late):
        branch.end_sessions()
        branch.sequence.close()


def test_every_call_that_reaches_a_tool_is_timed(conversing: Agent, question: Question) -> None:
    branch = opened(conversing, question)
    calls = [("slow", {"seconds": 0.05}), ("slow", {"seconds": -1}), ("slow", {}), ("nobody", {})]
    turn(conversing, branch, *calls)
    slow, broken, wrong, unknown = branch.calls
    branch.sequence.close()
    branch = opened(conversing, question)
    forging = "raise TimeoutError('the code ran longer than')"
    calls = [("python", {"code": "while True: pass", "timeout": 0.2}), ("python", {"code": forging})]
    turn(conversing, branch, *calls, ("python", {"code": "1/0"}))
    late, forged, error = branch.calls
    assert slow.ok and 0.05 <= (slow.seconds or 0) < 1
    assert not broken.ok and not wrong.ok and None not in (broken.seconds, wrong.seconds)
    assert unknown.seconds is None, "it reached no tool"
    assert late.timed_out and 0.2 <= (late.seconds or 0) < 5
    assert not forged.timed_out and not error.timed_out and "ZeroDivision" in (error.error or "")
    line = json.loads(conversing_line(conversing, branch))
    assert all("seconds" not in call and "timed_out" not in call for call in line["tool_calls"])
    branch.end_sessions()
    branch.sequence.close()


def conversing_line(agent: Agent, branch: Branch) -> str:
    branch.status = "answered"
    return agent.trajectory(branch, 1).to_json()


def test_tool_metrics_count_what_they_say() -> None:
    seed = random.getrandbits(32)
    rng = random.Random(seed)
    group = random_group(rng, size=12, tool_rate=1.0)
    resamples = [t for source in group[:4] for t in random_resamples(rng, source)]
    made: dict[str, list[tuple[ToolCall, Trajectory]]] = {"zoom": [], "python": []}
    for t in [*group, *resamples]:
        for call in t.tool_calls:
            call.name, call.ok = rng.choice(["zoom", "python"]), rng.random() < 0.6
            call.seconds, call.timed_out = rng.expovariate(3.0), not call.ok and rng.random() < 0.5
            made[call.name].append((call, t))
    group[0].tool_calls[0].seconds = None
    made = {name: [pair for pair in some if pair[0].seconds is not None] for name, some in made.items()}
    metrics = tool_metrics([*group, *resamples])
    assert len(metrics) == 12
    for name, calls in made.items():
        seconds = sorted(call.seconds or 0 for call, _ in calls)
        callers = {t.id: t.reward for _, t in calls}
        expected = {
            "calls": len(calls),
            "error_rate": sum(not call.ok for call, _ in calls) / len(calls),
            "timeout_rate": sum(call.timed_out for call, _ in calls) / len(calls),
            "accuracy": sum(callers.values()) / len(callers),
            "latency_median_s": np.median(seconds),
            "latency_p95_s": np.quantile(seconds, 0.95),
        }
        assert {n: metrics[f"tool/{name}/{n}"] for n in expected} == pytest.approx(expected), f"seed {seed}"


def test_a_call_before_the_fork_is_its_sources() -> None:
    source = random_group(random.Random(3), size=1, tool_rate=1.0)[0]
    source.tool_calls[0].seconds = 1.0
    fork = source.roles.index(1, source.tool_calls[0].end + 3)
    made = random_resamples(random.Random(1), source, 6, fork=fork)
    assert all(t.tool_calls[0] is source.tool_calls[0] for t in made)
    assert tool_metrics([source, *made])["tool/image_zoom_in/calls"] == 1
    assert tool_metrics([]) == {}

"""The suite's scripted teacher: calls that are really made, slips and shares as the style says, rows token by token."""

import secrets
from itertools import pairwise

import numpy as np
import pytest

from axpo.conversation import Conversation
from axpo.grading import Grader
from axpo.paths import model_directory
from axpo.tasks import Question, get_task
from axpo.tasks.scripted import SUITE_STYLES, scripted_teacher
from axpo.tasks.suite import TOOLS
from axpo.tasks.teacher import Style, make_row
from axpo.tasks.text_teacher import NOTHING, copying, text_teacher
from axpo.tools import Tool, get_tools
from engine import Processor

SEED = secrets.randbits(32)
TEXT = ("reasoning", "search")
EXACT, SLIPS = Style(1, 1, miss=0.0, describe=0), Style(1, 1, miss=1.0, describe=0)


@pytest.fixture(scope="module")
def tools() -> dict[str, Tool]:
    return get_tools(TOOLS, {"tavily-search": {"path": "facts"}})


@pytest.fixture(scope="module")
def sessions(tools: dict[str, Tool]) -> dict[str, Tool]:
    return {name: tool.session() for name, tool in tools.items()}


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(model_directory("suite/base"))


def questions(family: str, number: int) -> list[Question]:
    task = get_task(family)
    indices = np.random.default_rng(SEED).integers(task.size("train"), size=number)
    return [task.question("train", int(index)) for index in indices]


def reward(question: Question, messages: list[dict]) -> float:
    last = f"{messages[-1]['reasoning_content']}\n</think>\n\n{messages[-1]['content']}"
    return Grader().grade(last, question.rubric).reward


@pytest.mark.parametrize("family", TEXT)
def test_exact_calls_are_made_and_give_the_answer(family: str, tools: dict[str, Tool], sessions: dict[str, Tool]):
    rng, right = np.random.default_rng(SEED), []
    for question in questions(family, 120):
        messages = text_teacher(question, rng, EXACT, sessions)
        right.append(reward(question, messages))
        call = messages[0]["tool_calls"][0]["function"]
        again = tools[call["name"]].call(call["arguments"], [])  # in a kernel of its own
        assert again.ok and messages[1]["content"] == [{"type": "text", "text": again.text}]
    # The best document is another one's where a name holds another name.
    assert np.mean(right) == 1.0 if family == "reasoning" else np.mean(right) > 0.95, f"seed {SEED}"


@pytest.mark.parametrize("family", TEXT)
def test_slips_are_other_calls_and_mostly_wrong(family: str, sessions: dict[str, Tool]):
    rng, right, again = np.random.default_rng(SEED), [], 0
    for question in questions(family, 200):
        made = text_teacher(question, rng, SLIPS, sessions)
        exact = text_teacher(question, rng, EXACT, sessions)
        first, best = (messages[0]["tool_calls"][0]["function"]["arguments"] for messages in (made, exact))
        if made[1]["content"][0]["text"] in NOTHING:
            again += 1
            assert made[2]["tool_calls"][0]["function"]["arguments"] == best, "it calls again, exactly"
        elif first != best:  # a digit may be drawn for itself
            right.append(reward(question, made))
    assert again >= 5 and len(right) >= 50 and np.mean(right) < 0.3, f"seed {SEED}"


@pytest.mark.parametrize("name", sorted(SUITE_STYLES))
@pytest.mark.parametrize("family", TEXT)
def test_calls_are_as_many_as_the_style_says(family: str, name: str, sessions: dict[str, Tool]):
    style, rng = SUITE_STYLES[name][family], np.random.default_rng(SEED)
    calls: dict[bool, list[bool]] = {False: [], True: []}
    for question in questions(family, 400):
        messages = text_teacher(question, rng, style, sessions)
        calls[question.meta["easy"]].append("tool_calls" in messages[0])
        if "tool_calls" not in messages[0]:
            assert len(messages) == 1 and reward(question, messages) == 1.0
    for easy, expected in ((False, style.tool_hard), (True, style.tool_easy)):
        spread = 4.5 * np.sqrt(expected * (1 - expected) / len(calls[easy]))
        assert abs(np.mean(calls[easy]) - expected) <= spread, f"easy={easy}, seed {SEED}"


@pytest.mark.parametrize("family", TEXT)
def test_rows_are_the_tokens_of_a_rollout(
    family: str, processor: Processor, tools: dict[str, Tool], sessions: dict[str, Tool]
):
    conversation = Conversation(processor, tools)
    schemas = [tool.schema for tool in tools.values()]
    for question in questions(family, 20):
        messages = text_teacher(question, np.random.default_rng(SEED), SLIPS, sessions)
        row = make_row([*question.messages, *messages], question, processor, schemas)
        prompt = conversation.prompt(question.messages, [])
        assert row.tokens[: len(prompt)] == prompt and not any(row.loss_mask[: len(prompt)])
        edges = np.flatnonzero(np.diff([0, *row.loss_mask, 0])).reshape(-1, 2).tolist()
        assert len(edges) == sum(message["role"] == "assistant" for message in messages)
        for (start, end), message in zip(edges, [m for m in messages if m["role"] == "assistant"], strict=True):
            turn = row.tokens[start:end]
            assert turn[-1] == conversation.end_of_turn
            calls = conversation.calls(turn)
            wanted = [call["function"] for call in message.get("tool_calls", ())]
            assert [{"name": call.name, "arguments": call.arguments} for call in calls] == wanted
            assert all(call.error is None for call in calls)
        for (_, end), (start, _) in pairwise(edges):
            shown = conversation.observation([sessions["python"].call({"code": "1"}, [])], [])
            assert row.tokens[end : end + 2] == shown[:2] and row.tokens[start - 2 : start] == shown[-2:]


def test_a_name_and_a_number_are_cut_alike_wherever_they_stand(processor: Processor):
    places = ("language {}?", '{{"query": "language {}"', "The language {}\nfile", "({}).", "({},", "\n{}\n")
    for text in ("Alumu-Tesu", "Fquih Ben Salah", "4071", "124", "aal", "FIN", "008"):
        alone = processor.encode(text)
        for place in (*places, r"\boxed{{{}}}</answer>"):
            tokens = processor.encode(place.format(text))
            assert any(tokens[i : i + len(alone)] == alone for i in range(len(tokens))), (text, place)


def test_every_family_has_rows_and_a_wrong_style_is_refused(processor: Processor):
    teach = scripted_teacher("suite", "practice", processor, {})
    suite = get_task("suite")
    for index in range(6):
        row = teach(suite.question("train", index), np.random.default_rng(index))
        assert sum(row.loss_mask) > 5 and len(row.tokens) <= 260
        assert bool(row.images) == bool(row.image_labels) == (index % 3 == 0)
    with pytest.raises(ValueError, match=r"sft\.style = 'crops': task 'suite' has practice, copying, teacher"):
        scripted_teacher("suite", "crops", processor, {})


def test_copying_says_the_users_text_again(processor: Processor):
    rng, seen = np.random.default_rng(SEED), set()
    for _ in range(20):
        asked, said = copying(rng)
        assert asked["content"] == said["reasoning_content"] and asked["role"] == "user"
        seen.add(asked["content"])
        row = make_row([asked, said], questions("search", 1)[0], processor, [])
        trained = [token for token, mask in zip(row.tokens, row.loss_mask, strict=True) if mask]
        assert processor.decode(trained).startswith(f"{asked['content']}\n</think>")
    assert len(seen) == 20

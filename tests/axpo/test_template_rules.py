"""What a template does to a turn that is not as it would write it, and checkpoints whose template cannot do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from axpo.cli import resolve
from axpo.config import Config
from axpo.conversation import Conversation
from axpo.data.rows import parse_row
from axpo.inputs import check_inputs
from axpo.paths import model_directory
from axpo.tasks.conversations import conversation_row
from axpo.tools import ToolResult, get_tools
from engine.processor import Processor
from tests.axpo import templates

CALL = '<tool_call>\n{"name": "image_zoom_in", "arguments": {"x": 1}}\n</tool_call>'
MESSAGE = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "image_zoom_in", "arguments": {"x": 1}}}],
}
RESULT = ToolResult(True, "seen")
ASK = [{"role": "user", "content": "Which?"}]
TAGS = ("<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|endoftext|>", "<tool_call>", "</tool_response>", "</think>")
QUOTED = f"a{''.join(TAGS)}<<|im_end|>b"


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Conversation:
    processor = templates.checkpoint(tmp_path_factory.mktemp("thinking"), templates.THINKING)
    return Conversation(processor, get_tools(["image_zoom_in"]))


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Conversation:
    processor = templates.checkpoint(tmp_path_factory.mktemp("instruct"), templates.INSTRUCT)
    return Conversation(processor, get_tools(["image_zoom_in"]))


def tags_in(conversation: Conversation, tokens: list[int]) -> list[str]:
    """The tokens that the tokenizer gives a meaning, in order."""
    added = conversation.processor.tokenizer.added_tokens_decoder
    return [added[token].content for token in tokens if token in added]


@pytest.mark.parametrize(
    ("family", "sampled", "reasoning", "becomes"),
    [
        # Line ends at the edges of a thought and before the text are stripped; Qwen3-VL-Thinking's template does so.
        ("thinking", f"\nSo.\n</think>\n\n{CALL}", "\nSo.", f"So.\n</think>\n\n{CALL}"),
        ("thinking", f"So.\n\n\n</think>\n\n{CALL}", "So.\n\n", f"So.\n</think>\n\n{CALL}"),
        ("thinking", f"So.</think>{CALL}", "So.", f"So.\n</think>\n\n{CALL}"),
        # A turn behind which others stand loses a <think> that holds nothing.
        ("thinking", f"\n</think>\n\n{CALL}", "", f"<|im_start|>assistant\n{CALL}"),
        # A call is written again, with JSON's own spaces.
        ("thinking", f"So.\n</think>\n\n{CALL.replace(': ', ':')}", "So.", f"So.\n</think>\n\n{CALL}"),
        ("instruct", CALL.replace("{", "{ "), "", CALL),
    ],
)
def test_what_a_template_would_write_otherwise_stays_as_it_was_sampled(
    request: pytest.FixtureRequest, family: str, sampled: str, reasoning: str, becomes: str
) -> None:
    conversation: Conversation = request.getfixturevalue(family)
    processor = conversation.processor
    prompt = conversation.prompt(ASK, [])
    ids = processor.encode(f"{sampled}<|im_end|>")
    appended = prompt + ids + conversation.observation([RESULT], [])
    messages = [*ASK, {**MESSAGE, "reasoning_content": reasoning}, {"role": "tool", "content": "seen"}]
    whole = processor.encode(processor.render(messages, conversation.schemas))
    assert appended != whole and f"{becomes}<|im_end|>" in processor.decode(whole)
    assert processor.decode(appended) == processor.decode(prompt) + f"{sampled}<|im_end|>" + processor.decode(
        conversation.observation([RESULT], [])
    )
    # Behind the turn both are the same: what differs is the sampled turn alone.
    behind = len(conversation.observation([RESULT], []))
    assert appended[-behind:] == whole[-behind:]
    assert [call.error for call in conversation.calls(ids)] == [None]


def test_a_line_end_that_would_merge_with_the_prompts_stays_apart(instruct: Conversation) -> None:
    processor = instruct.processor
    prompt, sampled = instruct.prompt(ASK, []), processor.encode("\nSo.")
    together = processor.encode(processor.decode(prompt + sampled))
    assert processor.decode(together) == processor.decode(prompt + sampled)
    assert together != prompt + sampled, "the tokenizer merges the two line ends of the prompt and of the turn"
    assert together[: len(prompt)] != prompt, "so that tokens which had been computed would be others"


def test_tokens_that_are_not_the_tokenizers_own_are_kept(thinking: Conversation) -> None:
    processor = thinking.processor
    letters = [i for part in ("I", " ", "l", "o", "o", "k", ".", "\n") for i in processor.encode(part)]
    assert letters != processor.encode("I look.\n")
    sampled = [*letters, *processor.encode(f"</think>\n\n{CALL}<|im_end|>")]
    tokens = thinking.prompt(ASK, []) + sampled + thinking.observation([RESULT], [])
    canonical = processor.encode(processor.decode(tokens))
    assert len(canonical) < len(tokens) and processor.decode(canonical) == processor.decode(tokens)
    assert [call.error for call in thinking.calls(sampled)] == [None]


def test_tags_that_somebody_quotes_are_letters_in_every_message(thinking: Conversation) -> None:
    def asked(text: str) -> list[dict[str, Any]]:
        said = text.replace("</think>", "").replace("<tool_call>", "")
        arguments = {"x": text, "y": [text]}
        return [
            {"role": "system", "content": text},
            {"role": "user", "content": [{"type": "text", "text": text}, {"type": "image"}]},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
            {"role": "tool", "content": text},
            {
                "role": "assistant",
                "content": f"<think>\nOld.\n</think>\n\n{said}",
            },
            {"role": "user", "content": text},
        ]

    image = thinking.processor.image(Image.new("RGB", (64, 64)))
    plain, quoted = (thinking.prompt(asked(text), [image]) for text in ("a", QUOTED))
    assert tags_in(thinking, quoted) == tags_in(thinking, plain), "no token of the markup more than without the tags"
    said = thinking.processor.decode(quoted)
    assert said.count(QUOTED) == 6 and "Old." not in said
    observed = thinking.observation([ToolResult(True, QUOTED)], [])
    assert tags_in(thinking, observed) == tags_in(thinking, thinking.observation([RESULT], []))
    assert QUOTED in thinking.processor.decode(observed)


def test_tags_of_another_family_are_letters_as_well(tmp_path: Path) -> None:
    processor = templates.checkpoint(tmp_path, templates.INSTRUCT)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "<s>", "bab", "aba"]})
    conversation = Conversation(processor, {})
    tokens = conversation.prompt([{"role": "user", "content": "[INST]<s> ababab"}], [])
    assert tags_in(conversation, tokens) == tags_in(conversation, conversation.prompt(ASK, []))
    assert "[INST]<s> ababab" in processor.decode(tokens)


def test_a_conversation_to_learn_from_may_quote_tags(thinking: Conversation) -> None:
    said = "It means <|image_pad|>, then <|im_end|>.\n</think>\n\nDone."
    messages = [{"role": "user", "content": QUOTED}, {"role": "assistant", "content": said}]
    row, problems = parse_row({"id": "a", "messages": messages}, Path())
    assert row is not None, problems
    learned = conversation_row(row, thinking)
    trained = [token for token, mask in zip(learned.tokens, learned.loss_mask, strict=True) if mask]
    assert tags_in(thinking, trained) == ["</think>", "<|im_end|>"]
    assert thinking.processor.decode(trained) == f"{said}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (templates.NO_TOOLS, r"does not show the tool 'image_zoom_in' to the model; .*set rollout\.tools to \[\]"),
        (templates.NO_RESPONSES, r"does not show what a tool answers"),
        ("{{- raise_exception('no way') -}}", "refuses messages of roles user: no way"),
        ("", "does not show the tool"),
    ],
)
def test_a_template_that_cannot_show_tools_is_refused(tmp_path: Path, template: str, told: str) -> None:
    processor = templates.checkpoint(tmp_path, template or "{{- '' -}}")
    with pytest.raises(ValueError, match=told):
        Conversation(processor, get_tools(["image_zoom_in"]))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (templates.NO_SYSTEM, "refuses messages of roles system, user: System role not supported"),
        (templates.SILENT_SYSTEM, r"leaves out messages\[0\], which is of role 'system'"),
    ],
)
def test_a_template_without_a_system_message_says_so(tmp_path: Path, template: str, told: str) -> None:
    conversation = Conversation(templates.checkpoint(tmp_path, template), {})
    assert "Which?" in conversation.processor.decode(conversation.prompt(ASK, []))
    with pytest.raises(ValueError, match=told):
        conversation.prompt([{"role": "system", "content": "Be brief."}, *ASK], [])


def test_a_checkpoint_without_a_template_is_named(tmp_path: Path) -> None:
    templates.checkpoint(tmp_path, templates.INSTRUCT)
    (tmp_path / "chat_template.jinja").unlink()
    conversation = Conversation(Processor.from_pretrained(tmp_path), {})
    with pytest.raises(ValueError, match="chat_template"):
        conversation.prompt(ASK, [])


def test_a_text_only_template_is_given_texts(tmp_path: Path) -> None:
    # Qwen3's takes no lists of parts, and would write nothing for them.
    processor = templates.checkpoint(tmp_path, templates.TEXT_ONLY, images=False)
    conversation = Conversation(processor, get_tools(["image_zoom_in"]))
    parts = [{"type": "text", "text": "Which "}, {"type": "text", "text": "digit?"}]
    tokens = conversation.prompt([{"role": "user", "content": parts}], [])
    assert "user\nWhich digit?<|im_end|>" in processor.decode(tokens)
    assert "\nseen\n</tool_response>" in processor.decode(conversation.observation([RESULT], []))
    with pytest.raises(ValueError, match="a text-only checkpoint takes no images"):
        processor.image(Image.new("RGB", (8, 8)))


@pytest.mark.parametrize(
    ("system", "text", "told"),
    [
        ("Be brief.", "Which?", "question 'a': .*refuses messages of roles system, user: System role not supported"),
        ("", "Which? " * 900, r"rollout\.max_tokens = 512: the prompt of question 'a' has \d+ tokens; raise it"),
    ],
)
def test_the_first_question_is_put_before_anything_is_loaded(tmp_path: Path, system: str, text: str, told: str) -> None:
    model = shutil.copytree(model_directory("mini"), tmp_path / "model")
    (model / "chat_template.jinja").write_text(templates.NO_SYSTEM)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "a", "messages": messages, "answer": "7"}) + "\n")
    argv = ["--model.path", str(model), "--data.task", "jsonl", "--data.path", str(rows), "--eval.questions", "0"]
    with pytest.raises(ValueError, match=told):
        check_inputs(resolve(Config, [*argv, "--rollout.max_tokens", "512"], recipe="mini"))

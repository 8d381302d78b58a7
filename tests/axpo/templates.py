"""Checkpoints of other families for the tests: a byte-level BPE like Qwen's, and templates by the rules of several."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from axpo.tasks.build_mini import build_mini
from axpo.tasks.tokenizer import SPECIAL, TAGS, chat_template
from engine.processor import Processor


def checkpoint(path: Path, template: str, *, images: bool = True) -> Processor:
    """The mini model's files with Qwen's way to cut texts, images of 1 to 36 tokens, and a template."""
    build_mini(path)
    PreTrainedTokenizerFast(
        tokenizer_object=merging_tokenizer(), eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    ).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    ids = merging_tokenizer()
    config["image_token_id"] = ids.token_to_id("<|image_pad|>")
    config["vision_start_token_id"] = ids.token_to_id("<|vision_start|>")
    if not images:
        config = {**config["text_config"], "model_type": "qwen3", "tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    pictures = json.loads((path / "preprocessor_config.json").read_text())
    pictures["size"] = {"shortest_edge": 32**2, "longest_edge": 192**2}
    (path / "preprocessor_config.json").write_text(json.dumps(pictures))
    return Processor.from_pretrained(path)


def merging_tokenizer() -> Tokenizer:
    """Qwen's normaliser and regular expression, and merges of what stands at the edges of turns."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    edges = [
        "\n\n",
        "\n\n\n",
        " \n",
        "\n \n",
        "  ",
        ".\n\n",
        '"}\n',
        '"}}\n\n',
        "user\n",
        "assistant\n",
        "system\n",
        "é\n",
    ]
    words = [
        "the image shows",
        "name",
        "arguments",
        "error:",
        "I look.",
        '{"name": "',
        '", "arguments": {"',
        "42 é ü 漢字",
    ]
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([edge * 3 for edge in edges] * 20 + words * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    return tokenizer


THINKING = chat_template()
"""The rules of Qwen3-VL-Thinking: <think> opened, thoughts of earlier turns dropped."""

_BODY = r"""
{%- macro body(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == "image" -%}{{- "<|vision_start|><|image_pad|><|vision_end|>" -}}
      {%- elif part.type == "text" -%}{{- part.text -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""
_TEXT_ONLY = '{%- macro body(content) -%}{{- content if content is string else "" -}}{%- endmacro -%}'
_SYSTEM = r"""
{%- set first = messages[0] -%}
{%- if tools or first.role == "system" -%}
  {{- "<|im_start|>system\n" -}}
  {%- if first.role == "system" -%}{{- body(first.content) -}}{%- if tools -%}{{- "\n\n" -}}{%- endif -%}{%- endif -%}
  {%- if tools -%}
    {{- "What you can call:\n<tools>" -}}
    {%- for tool in tools -%}{{- "\n" + (tool | tojson) -}}{%- endfor -%}
    {{- "\n</tools>\nSay <tool_call>\n{\"name\": …, \"arguments\": …}\n</tool_call>" -}}
  {%- endif -%}
  {{- "<|im_end|>\n" -}}
{%- endif -%}
"""
_CALLS = r"""
    {%- for call in message.tool_calls or [] -%}
      {%- if message.content or not loop.first -%}{{- "\n" -}}{%- endif -%}
      {%- set call = call.function or call -%}
      {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + "}\n</tool_call>" -}}
    {%- endfor -%}
"""
_RESPONSES = r"""
  {%- elif message.role == "tool" -%}
    {%- if loop.first or loop.previtem.role != "tool" -%}{{- "<|im_start|>user" -}}{%- endif -%}
    {{- "\n<tool_response>\n" + body(message.content) + "\n</tool_response>" -}}
    {%- if loop.last or loop.nextitem.role != "tool" -%}{{- "<|im_end|>\n" -}}{%- endif -%}
"""
_TURNS = r"""
{%- for message in messages -%}
  {%- if message.role == "user" -%}
    {{- "<|im_start|>user\n" + body(message.content) + "<|im_end|>\n" -}}
  {%- elif message.role == "assistant" -%}
    {{- "<|im_start|>assistant\n" + body(message.content) -}}@CALLS@{{- "<|im_end|>\n" -}}@RESPONSES@
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\n" -}}{%- endif -%}
"""


def _made(*parts: str) -> str:
    return "".join(parts)


INSTRUCT = _made(_BODY, _SYSTEM, _TURNS.replace("@CALLS@", _CALLS).replace("@RESPONSES@", _RESPONSES))
"""The rules of Qwen3-VL-Instruct: nothing of a turn is changed or dropped."""

TEXT_ONLY = INSTRUCT.replace(_BODY, _TEXT_ONLY)
"""Qwen3's: content that is not one text is none."""

NO_TOOLS = _made(_BODY, _SYSTEM, _TURNS.replace("@CALLS@", "").replace("@RESPONSES@", "")).replace(
    "if tools", "if false"
)
"""Ignores tools and what they answer, as chat models of before do."""

NO_RESPONSES = _made(_BODY, _SYSTEM, _TURNS.replace("@CALLS@", _CALLS).replace("@RESPONSES@", ""))
"""Shows tools, and not what they answer."""

NO_SYSTEM = _made(
    '{%- if messages[0].role == "system" -%}{{- raise_exception("System role not supported") -}}{%- endif -%}', INSTRUCT
)
"""Refuses a system message, as Gemma's does."""

SILENT_SYSTEM = _made(_BODY, _TURNS.replace("@CALLS@", "").replace("@RESPONSES@", ""))
"""Ignores one."""

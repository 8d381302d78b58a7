"""Tokenizer and chat template of the embedded models: Qwen3-VL's markup over a vocabulary that a task declares."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_BEFORE_TOOLS = (
    "# Tools\n\nYou may call functions to help the user. Their signatures are in <tools></tools>:\n<tools>\n"
)
_AFTER_TOOLS = "\n</tools>\n\nFor each call, answer with a JSON object inside tags:\n"
_CALL_FORM = '{"name": <function-name>, "arguments": <args-json-object>}'


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What an embedded model reads and writes often, so that it is short in tokens.

    units: regular expression of what the text is split into; a token lies within one unit.
    merges: BPE merges at most, over the units of `corpus`. phrases: constant texts, one token each wherever they occur.
    """

    units: str
    merges: int
    corpus: Iterable[str]
    phrases: tuple[str, ...]

    @property
    def added(self) -> tuple[str, ...]:
        """Every token beside bytes and merges."""
        return SPECIAL + TAGS + self.phrases


def phrases(schemas: Iterable[dict], *others: str) -> tuple[str, ...]:
    """The prompt's constant text, these tools' schemas, what opens their calls and encloses an answer, `others`."""
    schemas = list(schemas)
    return (
        _BEFORE_TOOLS,
        *(json.dumps(schema, ensure_ascii=False) for schema in schemas),
        _AFTER_TOOLS,
        _CALL_FORM,
        *(f'{{"name": "{schema["function"]["name"]}", "arguments": ' for schema in schemas),
        *others,
        r"<answer>\boxed{",
        "}</answer>",
    )


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Trains the tokenizer; the same result every time. Any string is encoded without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(vocabulary.units), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + vocabulary.merges,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(vocabulary.corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS + vocabulary.phrases])
    return tokenizer


def chat_template() -> str:
    """Qwen3-VL-Thinking's rules in Jinja, with our wording of the tools' preamble."""
    return _TEMPLATE.replace("@BEFORE@", _quote(_BEFORE_TOOLS)).replace(
        "@AFTER@", _quote(f"{_AFTER_TOOLS}<tool_call>\n{_CALL_FORM}\n</tool_call>")
    )


def _quote(text: str) -> str:
    return json.dumps(text)


_TEMPLATE = r"""
{#- Images and text of one message, in order. -#}
{%- macro body(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content -%}
    {%- for part in content -%}
      {%- if part.type == "image" or "image" in part or "image_url" in part -%}
        {{- "<|vision_start|><|image_pad|><|vision_end|>" -}}
      {%- elif part.type == "video" or "video" in part -%}
        {{- "<|vision_start|><|video_pad|><|vision_end|>" -}}
      {%- elif "text" in part -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}

{#- Reasoning is kept only after the last question that a user asked. -#}
{%- set seen = namespace(query=-1) -%}
{%- for message in messages -%}
  {%- if message.role == "user" and not body(message.content).startswith("<tool_response>") -%}
    {%- set seen.query = loop.index0 -%}
  {%- endif -%}
{%- endfor -%}

{%- if tools -%}
  {{- "<|im_start|>system\n" -}}
  {%- if messages[0].role == "system" -%}
    {{- body(messages[0].content) + "\n\n" -}}
  {%- endif -%}
  {{- @BEFORE@ -}}
  {%- for tool in tools -%}
    {{- tool | tojson -}}
    {%- if not loop.last -%}{{- "\n" -}}{%- endif -%}
  {%- endfor -%}
  {{- @AFTER@ + "<|im_end|>\n" -}}
{%- elif messages[0].role == "system" -%}
  {{- "<|im_start|>system\n" + body(messages[0].content) + "<|im_end|>\n" -}}
{%- endif -%}

{%- for message in messages -%}
  {%- if message.role == "user" or (message.role == "system" and not loop.first) -%}
    {{- "<|im_start|>" + message.role + "\n" + body(message.content) + "<|im_end|>\n" -}}
  {%- elif message.role == "assistant" -%}
    {%- set text = body(message.content) -%}
    {%- set thought = "" -%}
    {%- if message.reasoning_content is string -%}
      {%- set thought = message.reasoning_content -%}
    {%- elif "</think>" in text -%}
      {%- set thought = text.split("</think>")[0].split("<think>")[-1] -%}
      {%- set text = text.split("</think>")[-1] -%}
    {%- endif -%}
    {%- set text = text.lstrip("\n") -%}
    {{- "<|im_start|>assistant\n" -}}
    {%- if loop.index0 > seen.query and (loop.last or thought) -%}
      {{- "<think>\n" + thought.strip("\n") + "\n</think>\n\n" -}}
    {%- endif -%}
    {{- text -}}
    {%- for call in message.tool_calls or [] -%}
      {%- if text or not loop.first -%}{{- "\n" -}}{%- endif -%}
      {%- set call = call.function or call -%}
      {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' -}}
      {{- call.arguments if call.arguments is string else call.arguments | tojson -}}
      {{- "}\n</tool_call>" -}}
    {%- endfor -%}
    {{- "<|im_end|>\n" -}}
  {%- elif message.role == "tool" -%}
    {%- if loop.first or messages[loop.index0 - 1].role != "tool" -%}
      {{- "<|im_start|>user" -}}
    {%- endif -%}
    {{- "\n<tool_response>\n" + body(message.content) + "\n</tool_response>" -}}
    {%- if loop.last or messages[loop.index0 + 1].role != "tool" -%}
      {{- "<|im_end|>\n" -}}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<|im_start|>assistant\n<think>\n" -}}
{%- endif -%}
""".lstrip("\n")

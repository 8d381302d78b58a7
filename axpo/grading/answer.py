"""The final answer of a text, and the form in which two answers are compared."""

import re
from functools import lru_cache

_BOX = r"\boxed{"
_END = re.compile(r"<think>|<\|im_end\|>")
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")
_GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", re.ASCII)
_NUMBER = re.compile(r"([+-]?)(\d*)(?:\.(\d*))?", re.ASCII)


def final_answer(text: str, *, thinking: bool = True) -> str | None:
    r"""The content of the one `\boxed{…}` in the last `<answer>…</answer>` outside the thinking, or None.

    text: the sampled text of a turn or of a whole trajectory. What is thought does not count: with `thinking` (the
    prompt has opened <think>) everything up to the last </think> is dropped; a text that never closes it has no answer.
    Several boxes, or an answer that is not closed, are none.
    """
    _, closed, visible = text.rpartition("</think>")
    if thinking and not closed:
        return None
    # What follows the turn that closed its thinking is not its answer: an observation, or thinking never closed.
    visible = _END.split(visible, maxsplit=1)[0]
    before, closed, _ = visible.rpartition("</answer>")
    if not closed or "<answer>" not in before:
        return None
    content = before.rpartition("<answer>")[2]
    if content.count(_BOX) != 1:
        return None
    return _braced(content.partition(_BOX)[2])


@lru_cache(maxsize=4096)  # most rollouts of a question give one of a few answers
def normalise(answer: str) -> str:
    r"""Case, spaces, `$`, `\text{…}`, a final full stop and the way a number is written do not matter."""
    text = _TEXT.sub(r"\1", answer.replace("$", ""))
    text = " ".join(text.split()).casefold().removesuffix(".").strip()
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    number = _NUMBER.fullmatch(text)
    if number is None or not (number[2] or number[3]):
        return text
    whole, fraction = number[2].lstrip("0") or "0", (number[3] or "").rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return f"-{value}" if number[1] == "-" and value != "0" else value


def _braced(text: str) -> str | None:
    """The part of `text` up to the brace that closes one opened before it, or None when there is none."""
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:index]
    return None

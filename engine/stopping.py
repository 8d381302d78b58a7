"""Where stop strings end a run and its text."""

from collections.abc import Callable
from collections.abc import Sequence as Seq

from engine.sampling_params import SamplingParams

Decode = Callable[[Seq[int], bool], str]
"""(token ids, skip special tokens) -> text."""


def met_stop_string(decode: Decode, token_ids: list[int], start: int, params: SamplingParams) -> str | None:
    """The first of `params.stop` that the newest token completes in the text of `token_ids[start:]`, or None.

    A string may be spread over tokens and a token may hold several; what the first `min_tokens` tokens complete does
    not count. Looks at the end of the text alone.
    """
    sampled = len(token_ids) - start
    if sampled <= params.min_tokens:
        return None
    longest = max(map(len, params.stop))
    window = min(longest + 4, sampled)
    # Special tokens have no text, and the first characters of a window may be halves.
    while len(text := decode(token_ids[-window:], True)) < longest + 4 and window < sampled:
        window = min(2 * window, sampled)
    if not any(stop in text for stop in params.stop):
        return None
    before = decode(token_ids[len(token_ids) - window : -1], True)
    return next((stop for stop in params.stop if find_new(stop, text, before) >= 0), None)


def text_of(decode: Decode, token_ids: list[int], params: SamplingParams, stopped_by: int | str | None) -> str:
    """The text of a run's tokens, which ends before (or with) the stop string that ended it."""
    text = decode(token_ids, True)
    if isinstance(stopped_by, str):
        end = find_new(stopped_by, text, decode(token_ids[:-1], True))
        text = text[: end + len(stopped_by) if params.include_stop_str_in_output else end]
    return text


def find_new(stop: str, text: str, before: str) -> int:
    """Where `stop` first stands in `text` and was not yet whole in `before`, the text one token ago; −1 if nowhere."""
    known = len(before.rstrip("\ufffd"))  # a character whose bytes were not all there
    return text.find(stop, max(known - len(stop) + 1, 0))

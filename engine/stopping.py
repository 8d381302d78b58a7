"""What a sampled token does to its run, and where stop strings end the run and its text."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.scheduler import Request

Decode = Callable[[Seq[int], bool], str]
"""(token ids, skip special tokens) -> text."""


def append_sampled(
    decode: Decode, requests: list[Request], tokens: list[int], logprobs: list[float], entropies: list[float]
) -> set[Request]:
    """Gives each request its sampled token; returns those that end with it."""
    finished: set[Request] = set()
    for request, token, logprob, entropy in zip(requests, tokens, logprobs, entropies, strict=True):
        token_ids = request.sequence.token_ids
        request.sequence.num_computed = len(token_ids)
        token_ids.append(token)
        request.logprobs.append(logprob)
        request.entropies.append(entropy)
        if token in request.stop_ids:
            request.stopped_by = token
            finished.add(request)
            continue
        if request.params.stop:
            request.stopped_by = met_stop_string(decode, token_ids, request.start, request.params)
        if request.stopped_by is not None or len(token_ids) >= request.limit:
            finished.add(request)
    return finished


def met_stop_string(decode: Decode, token_ids: list[int], start: int, params: SamplingParams) -> str | None:
    """The first of `params.stop` that the newest token completes in the text of `token_ids[start:]`, or None.

    A string may be spread over tokens and a token may hold several; what the first `min_tokens` tokens complete does
    not count. Looks at the end of the text alone.
    """
    sampled = len(token_ids) - start
    if sampled <= params.min_tokens:
        return None
    stops = params.stop or ()
    longest = max(map(len, stops))
    window = min(longest + 4, sampled)
    # Special tokens have no text, and the first characters of a window may be halves.
    while len(text := decode(token_ids[-window:], True)) < longest + 4 and window < sampled:
        window = min(2 * window, sampled)
    if not any(stop in text for stop in stops):
        return None
    before = decode(token_ids[len(token_ids) - window : -1], True)
    return next((stop for stop in stops if find_new(stop, text, before) >= 0), None)


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

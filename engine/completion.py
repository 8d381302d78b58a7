"""How a run begins and ends where text is concerned: bad words, stop strings, and what it returns."""

from collections.abc import Callable
from collections.abc import Sequence as Seq

from engine.logits import LogitsShaper
from engine.outputs import CompletionOutput
from engine.sampling_params import SamplingParams
from engine.scheduler import Request

Decode = Callable[[Seq[int]], str]


def make_shaper(
    params: SamplingParams,
    start: int,
    stop_ids: frozenset[int],
    vocabulary: int,
    encode: Callable[[str], list[int]] | None,
) -> LogitsShaper:
    """encode: text to tokens, where `params` has bad words. Raises ValueError for a biased token out of range."""
    bad = next((token for token in params.logit_bias if not 0 <= token < vocabulary), None)
    if bad is not None:
        raise ValueError(f"SamplingParams.logit_bias has token {bad}, outside the vocabulary of {vocabulary}")
    # A word is written with and without the space before it.
    words = [encode(text) for word in params.bad_words for text in (word, f" {word}")] if encode else []
    return LogitsShaper(params, start, stop_ids, words)


def meets_stop_string(request: Request, decode: Decode) -> bool:
    """Looks for a stop string that the newest token completes: a token is at least one byte of the text."""
    token_ids, params = request.sequence.token_ids, request.params
    sampled = len(token_ids) - request.start
    if sampled < params.min_tokens:
        return False
    window = max(len(stop.encode()) for stop in params.stop) + 4
    text = decode(token_ids[-min(window, sampled) :])
    request.stopped_by = next((stop for stop in params.stop if stop in text), None)
    return request.stopped_by is not None


def completion(request: Request, decode: Decode, running: bool = False) -> CompletionOutput:
    """What the request has so far; finished unless `running`."""
    tokens, params, stopped_by = request.sequence.token_ids[request.start :], request.params, request.stopped_by
    text = decode(tokens) if tokens and params.detokenize else ""
    if isinstance(stopped_by, str):
        end = text.rfind(stopped_by)
        text = text[: end + len(stopped_by) if params.include_stop_str_in_output else end]
    return CompletionOutput(
        request.index,
        text,
        tokens,
        list(request.logprobs),
        list(request.entropies),
        None if running else "length" if stopped_by is None else "stop",
        stopped_by,
        list(request.processed_logprobs) if params.processed_logprobs else None,
        list(request.top_logprobs) if params.logprobs else None,
    )

"""How a sequence is continued."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

WHOLE = ("n", "top_k", "max_tokens", "min_tokens", "logprobs")
OPTIONAL = ("max_tokens", "logprobs")
REAL = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """vLLM's names and meanings. `seed` keys the noise of a branch: one seed draws one noise at one position.

    Frozen: `dataclasses.replace` makes another. None is nothing for stop, stop_token_ids, bad_words and logit_bias.
    n: continuations of a prompt. temperature: 0 is greedy. top_k: 0 and -1 are off. min_p: relative to the most
    probable token. seed: its low 64 bits count.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens that this run sampled, once or each time;
    repetition_penalty: divides (multiplies, where negative) the logits of all tokens in the sequence.
    logit_bias: token id -> added to its logit. bad_words: never completed.
    stop: strings that end the run; the text ends before them unless include_stop_str_in_output. stop_token_ids: tokens
    that end it, beside the checkpoint's end-of-sequence tokens unless ignore_eos. min_tokens: nothing ends it earlier.
    logprobs: also the most probable `logprobs` tokens of every step; 0 is none of them. processed_logprobs: also
    log-probs under the distribution that was really sampled from, after penalties, bias, top-k, top-p and min-p.
    detokenize: False leaves `text` empty.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = field(default_factory=dict)
    bad_words: str | Sequence[str] | None = ()
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    processed_logprobs: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 - the class is frozen
        for name in WHOLE:
            value: Any = getattr(self, name)
            optional = name in OPTIONAL
            if optional and value is None:
                continue
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                wanted = f"a whole number{', or None' if optional else ''}"
                raise ValueError(f"SamplingParams.{name} is {value!r}; it must be {wanted}")
            set_(name, index(value))
        if hasattr(self.seed, "__index__"):
            set_("seed", index(self.seed))  # type: ignore[arg-type]
        for name in REAL:
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__float__"):
                raise ValueError(f"SamplingParams.{name} is {value!r}; it must be a number")
            set_(name, float(value))
        for name in ("stop", "bad_words", "stop_token_ids"):
            value = getattr(self, name)
            set_(name, () if value is None else (value,) if isinstance(value, str | int) else tuple(value))
        set_("top_k", 0 if self.top_k == -1 else self.top_k)
        set_("logit_bias", {int(token): float(more) for token, more in (self.logit_bias or {}).items()})
        bias, stop, bad_words = self.logit_bias or {}, self.stop or (), self.bad_words or ()
        # Far outside what is of use, and so that no product or quotient of them and a logit overflows fp32.
        large, within = 1e10, "within ±1e10"
        checks = (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", self.temperature == 0 or 1e-8 <= self.temperature <= large, "0, or in 1e-8 … 1e10"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", 0 <= self.top_k < 2**63, "0 or -1 (off), or more"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("presence_penalty", abs(self.presence_penalty) <= large, within),
            ("frequency_penalty", abs(self.frequency_penalty) <= large, within),
            ("repetition_penalty", 1e-8 <= self.repetition_penalty <= large, "in 1e-8 … 1e10"),
            ("logit_bias", all(abs(more) <= large for more in bias.values()), f"a map to numbers {within}"),
            ("bad_words", all(isinstance(word, str) and word for word in bad_words), "words that are not empty"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None"),
            ("min_tokens", 0 <= self.min_tokens <= (self.max_tokens or math.inf), "in 0 … max_tokens"),
            ("stop", all(isinstance(text, str) and text for text in stop), "strings that are not empty"),
            ("stop", not stop or self.detokenize, "empty where detokenize is False: it is found in the text"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more, or None"),
            ("stop_token_ids", all(hasattr(token, "__index__") for token in self.stop_token_ids or ()), "token ids"),
        )
        for name, valid, wanted in checks:
            if not valid:
                raise ValueError(f"SamplingParams.{name} is {getattr(self, name)}; it must be {wanted}")

    @property
    def shapes_logits(self) -> bool:
        """Whether anything beyond temperature, top-k, top-p and min-p changes the logits, or more is to be reported."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1
            or self.logit_bias
            or self.bad_words
            or self.min_tokens
            or self.logprobs
            or self.processed_logprobs
        )


def derive_seed(*path: int | str) -> int:
    """A 63-bit seed from the path of a branch, such as (run seed, step, question, rollout, resample)."""
    digest = hashlib.blake2b(repr(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def one_each(given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """Of `count` prompts or sequences: one for all (None: the default) or a list of as many, else ValueError."""
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    if not isinstance(given, Sequence) or not all(isinstance(one, SamplingParams) for one in given):
        raise ValueError(
            f"sampling params are {type(given).__name__}; give SamplingParams, one for all or one for each"
        )
    if len(given) != count:
        raise ValueError(f"{len(given)} sampling params for {count} prompts; give one for all or one for each")
    return list(given)

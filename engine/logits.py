"""What single requests do to their logits before sampling, and what they want to know of them afterwards."""

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.models import ModelConfig
from engine.sampling_params import SamplingParams
from kernels.sampling import truncate


@dataclass(slots=True)
class LogitsShaper:
    """Penalties, bias, bad words and the minimum length of one run that begins behind `start` tokens of its sequence.

    bad_words: token ids of each. stop_ids: what may not be sampled before `min_tokens`. What has been counted of the
    sequence's tokens is kept, so that a step looks at its new token alone.
    """

    params: SamplingParams
    start: int
    stop_ids: frozenset[int]
    bad_words: list[list[int]]
    counted: int = 0
    sampled: Counter[int] = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)

    def apply(self, logits: Tensor, token_ids: Seq[int]) -> None:
        """Changes one row of logits, [V] fp32, in place; `token_ids` is all of the sequence."""
        params = self.params
        self.seen.update(token_ids[self.counted :])
        self.sampled.update(token_ids[max(self.counted, self.start) :])
        self.counted = len(token_ids)
        if params.logit_bias:
            logits[list(params.logit_bias)] += logits.new_tensor(list(params.logit_bias.values()))
        if params.repetition_penalty != 1 and self.seen:
            ids = torch.tensor(list(self.seen), device=logits.device)
            there = logits[ids]
            logits[ids] = torch.where(there > 0, there / params.repetition_penalty, there * params.repetition_penalty)
        if self.sampled and (params.presence_penalty or params.frequency_penalty):
            ids = torch.tensor(list(self.sampled), device=logits.device)
            counts = logits.new_tensor(list(self.sampled.values()))
            logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
        forbidden = [word[-1] for word in self.bad_words if self._completes(word, token_ids)]
        if len(token_ids) - self.start < params.min_tokens:
            forbidden += self.stop_ids
        if forbidden:
            logits[forbidden] = -torch.inf

    def _completes(self, word: list[int], token_ids: Seq[int]) -> bool:
        before = word[:-1]
        begin = len(token_ids) - len(before)
        return begin >= self.start and list(token_ids[begin:]) == before


def make_shaper(
    params: SamplingParams,
    start: int,
    stop_ids: frozenset[int],
    config: ModelConfig,
    encode: Callable[[str], list[int]],
) -> LogitsShaper | None:
    """None where the sampler alone does what `params` asks for. `encode`: text to token ids.

    Raises:
        ValueError: a biased or a stop token outside the vocabulary, or nothing is left that may be sampled.
    """
    vocabulary = config.text.vocab_size
    for name, tokens in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
        bad = next((token for token in tokens or () if not 0 <= token < vocabulary), None)
        if bad is not None:
            raise ValueError(f"SamplingParams.{name} has token {bad}, outside the vocabulary of {vocabulary}")
    if not params.shapes_logits:
        return None
    # A word is written with and without the space before it.
    words = [encode(text) for word in params.bad_words or () for text in (word, f" {word}")]
    never = {word[0] for word in words if len(word) == 1} | set(config.banned_token_ids)
    if len(never | stop_ids if params.min_tokens else never) == vocabulary:
        raise ValueError(
            f"SamplingParams: bad_words and, before min_tokens={params.min_tokens}, stop tokens are all of the "
            f"vocabulary of {vocabulary}; nothing is left to sample"
        )
    return LogitsShaper(params, start, stop_ids, words)


@dataclass(frozen=True, slots=True)
class Details:
    """Of one sampled token: raw log-prob and entropy at the sampling temperature, log-prob under the distribution that
    was sampled from (None unless wanted), the most probable tokens with their raw log-probs (None unless wanted)."""

    logprob: float
    entropy: float
    processed_logprob: float | None
    top_logprobs: dict[int, float] | None


def details(raw: Tensor, shaped: Tensor, token: int, params: SamplingParams, banned: Tensor) -> Details:
    """raw, shaped: one row of logits, [V] fp32, before and after `LogitsShaper.apply`."""
    scale = params.temperature or 1.0
    logp = torch.log_softmax(raw.double() / scale, dim=-1)
    entropy = -(logp.exp() * logp.clamp(min=-1e30)).sum().item()
    processed = top = None
    if params.processed_logprobs:
        z = shaped[None] / scale
        z[:, banned] = -torch.inf
        one = lambda value, dtype: torch.tensor([value], dtype=dtype, device=z.device)  # noqa: E731
        kept = truncate(
            z,
            one(params.top_k, torch.int64),
            one(params.top_p, torch.float32),
            one(params.min_p, torch.float32),
        )
        processed = 0.0 if params.temperature == 0 else torch.log_softmax(kept.double(), -1)[0, token].item()
    if params.logprobs:
        values, ids = logp.topk(min(params.logprobs, len(logp)))
        top = dict(zip(ids.tolist(), values.tolist(), strict=True))
    return Details(logp[token].item(), entropy, processed, top)

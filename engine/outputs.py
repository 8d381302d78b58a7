"""What a run returns, in vLLM's shapes."""

from dataclasses import dataclass


@dataclass(slots=True)
class CompletionOutput:
    """One continuation. `logprobs` and `entropies` hold one float a sampled token: of the distribution at the sampling
    temperature, before penalties, top-k and the like; the entropy is exact, in nats.

    finish_reason: "stop" (a stop token or string, which `stop_reason` names), "length", or None while it still runs.
    processed_logprobs, top_logprobs: one entry a token where SamplingParams asked for them, else None.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    finish_reason: str | None
    stop_reason: int | str | None = None
    processed_logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None

    @property
    def cumulative_logprob(self) -> float:
        return sum(self.logprobs)


@dataclass(slots=True)
class RequestOutput:
    """num_cached_tokens: prompt tokens whose KV the prefix cache held."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    num_cached_tokens: int = 0

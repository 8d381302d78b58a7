"""What a run returns, in vLLM's shapes."""

from dataclasses import dataclass


@dataclass(slots=True)
class CompletionOutput:
    """One continuation. `logprobs` and `entropies` hold one float a sampled token: of the distribution at the sampling
    temperature, before top-k and top-p; the entropy is exact, in nats.

    finish_reason: "stop" (eos or a stop token, whose id is `stop_reason`) or "length".
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    finish_reason: str
    stop_reason: int | None = None

    @property
    def cumulative_logprob(self) -> float:
        return sum(self.logprobs)


@dataclass(slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True

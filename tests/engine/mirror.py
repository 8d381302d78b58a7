"""What a sequence must hold, told by the operations alone: given parts, and parts that runs have sampled."""

from dataclasses import dataclass, field

from engine import ImageInput, SamplingParams, Sequence
from tests.engine.checkpoints import IMAGE


@dataclass(slots=True)
class Part:
    """Consecutive tokens of a sequence: given, with their images, or sampled by one run."""

    tokens: list[int]
    images: list[ImageInput] = field(default_factory=list)
    params: SamplingParams | None = None
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    def first(self, count: int) -> "Part":
        pads, images = self.tokens[:count].count(IMAGE), []
        for image in self.images:
            if pads >= image.num_tokens:
                images.append(image)
                pads -= image.num_tokens
        return Part(self.tokens[:count], images, self.params, self.logprobs[:count], self.entropies[:count])


@dataclass(slots=True, eq=False)
class Mirror:
    """What a sequence must hold, told by the operations alone."""

    sequence: Sequence
    parts: list[Part]

    def tokens(self) -> list[int]:
        return [token for part in self.parts for token in part.tokens]

    def absorb(self, logprobs: list[float], entropies: list[float]) -> int:
        """Takes over what the running part has sampled. Returns the number of new tokens."""
        part, before = self.parts[-1], sum(len(part.tokens) for part in self.parts)
        part.tokens += self.sequence.token_ids[before:]
        part.logprobs, part.entropies = list(logprobs), list(entropies)
        assert len(part.tokens) == len(part.logprobs) == len(part.entropies), "a token without a log-prob"
        return len(self.sequence.token_ids) - before

    def cut(self, at: int) -> list[Part]:
        parts = []
        for part in self.parts:
            if at > 0:
                parts.append(part.first(at))
            at -= len(part.tokens)
        return parts

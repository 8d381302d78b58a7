"""What a fresh engine says of the same tokens: every sequence computed from its parts alone, run by run."""

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine import LLM, CompletionOutput, SamplingParams, Sequence
from engine.logits import make_shaper
from kernels.sampling import gumbel_noise
from tests.engine.mirror import Mirror, Part

NEAR_TIE = 1e-3  # of two scores: rounding may decide between them
GREEDY = SamplingParams(temperature=0)


class FreshRuns:
    """`llm` forks, preempts, caches and shares nothing. `counts` are told what was verified."""

    def __init__(self, llm: LLM, counts: Counter[str]):
        self.llm, self.counts = llm, counts

    def verify(self, live: Seq[Mirror]) -> None:
        """Every sequence from its parts alone, on the fresh engine: the same tokens, log-probs and entropies."""
        for mirror in live:
            assert mirror.sequence.token_ids == mirror.tokens()
        again: list[tuple[Sequence, list[Part]]] = []
        for mirror in live:
            head, *rest = mirror.parts
            inputs = {"prompt_token_ids": list(head.tokens), "multi_modal_data": {"image": head.images}}
            again.append((self.llm.open(inputs), [part for part in rest if part.tokens]))
        opened = [sequence for sequence, _ in again]
        while again:
            turns = []
            for sequence, rest in again:
                while rest and rest[0].params is None:
                    part = rest.pop(0)
                    sequence.extend(part.tokens, part.images)
                if rest:
                    turns.append((sequence, rest, rest.pop(0)))
            outputs = self.llm.run([turn[0] for turn in turns], [self.same_length(turn[2]) for turn in turns])
            again = []
            for (sequence, rest, part), output in zip(turns, outputs, strict=True):
                if self.equal(sequence, part, output):
                    again.append((sequence, rest))
        for sequence in opened:
            sequence.close()
        self.counts["sequences verified"] += len(opened)

    def same_length(self, part: Part) -> SamplingParams:
        assert part.params is not None
        count = len(part.tokens)
        return replace(part.params, max_tokens=count, min_tokens=min(part.params.min_tokens, count))

    def equal(self, sequence: Sequence, part: Part, output: CompletionOutput) -> bool:
        """False where a near tie fell the other way, so that the rest cannot be compared."""
        same = [one == other for one, other in zip(part.tokens, output.token_ids, strict=False)]
        count = same.index(False) if False in same else len(part.tokens)
        np.testing.assert_allclose(part.logprobs[:count], output.logprobs[:count], atol=2e-4)
        np.testing.assert_allclose(part.entropies[:count], output.entropies[:count], atol=2e-4)
        self.counts["tokens verified"] += count
        if False not in same:
            assert part.tokens == output.token_ids
            return True
        self.counts["near ties"] += 1
        at = len(sequence) - len(output.token_ids) + count
        scores = self.scores(sequence, part.params or GREEDY, len(sequence) - len(output.token_ids), at)
        gap = (scores[part.tokens[count]] - scores[output.token_ids[count]]).abs().item()
        assert gap < NEAR_TIE, f"token {count} of {part} is {output.token_ids[count]} in a fresh run, {gap} apart"
        return False

    def scores(self, sequence: Sequence, params: SamplingParams, start: int, at: int) -> Tensor:
        """[V]: what the sampler takes the largest of, for the token at index `at` of a run that began at `start`."""
        (child,) = sequence.fork(at=at)
        self.llm.prefill([child])
        assert child.last_hidden is not None
        logits = self.llm.model.logits(child.last_hidden[None])[0].clone()
        child.close()
        stop_ids, encode = frozenset(params.stop_token_ids), self.llm.processor.encode_text
        shaper = make_shaper(params, start, stop_ids, self.llm.config, encode)
        if shaper is not None:
            shaper.apply(logits, sequence.token_ids[:at])
        if params.temperature == 0:
            return logits
        seed, position = torch.tensor([params.seed]), torch.tensor([at])
        return logits / params.temperature + gumbel_noise(seed, position, len(logits))[0]

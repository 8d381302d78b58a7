"""Where a rollout can be continued anew, and how unsure the policy was there (PAPER.md, "AXPO" 2–3, "Baselines")."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from axpo.trajectory import OBSERVATION, SAMPLED, Trajectory

ForkAt = Literal["call", "prompt", "answer", "observation"]


@dataclass(frozen=True, slots=True)
class Fork:
    """tokens: how many are kept. confidence: mean exp(logprob) of what is judged, entropy: its mean entropy in nats.

    rise: that entropy less the entropy of the rollout's first tokens, behind an observation; 0 elsewhere.
    """

    tokens: int
    confidence: float
    entropy: float
    rise: float = 0.0


def find_fork(rollout: Trajectory, at: ForkAt, think_end: int, window: int) -> Fork | None:
    """The one place of this kind at which the rollout may be continued anew, None where it has none.

    call: behind the opening tag of the first call, judged by the call. answer: behind the first turn's </think>, judged
    by the rest of that turn. prompt: behind the prompt, judged by the call, or by the answer where there is no call.
    observation: behind the tool response after which entropy rose most, if it rose, judged by the `window` tokens
    sampled first there; entropy is compared with the rollout's first `window` tokens (ARPO, arXiv 2507.19849).
    think_end: token id of </think>.
    """
    if at == "observation":
        return _behind_observation(rollout, window)
    by_call = at == "call" or (at == "prompt" and rollout.used_tool)
    span = _call_span(rollout) if by_call else _answer_span(rollout, think_end)
    if span is None:
        return None
    return Fork(rollout.prompt_len if at == "prompt" else span[0], *_uncertainty(rollout, *span))


def call_uncertainty(rollout: Trajectory) -> tuple[float, float] | None:
    """(confidence, mean entropy) of the first call, over its tokens behind the opening tag, closing tag included.

    The opening tag is one token of the vocabulary. A call without a token of its own is judged by the one that ended
    it. None when there is no call, or the tag is the last token that the limits allowed: nothing can follow it.
    """
    span = _call_span(rollout)
    return None if span is None else _uncertainty(rollout, *span)


def _call_span(rollout: Trajectory) -> tuple[int, int] | None:
    call = rollout.first_call
    if call is None or call.start + 1 == len(rollout.tokens):
        return None
    return call.start + 1, max(call.end, call.start + 2)


def _answer_span(rollout: Trajectory, think_end: int) -> tuple[int, int] | None:
    """Behind the first turn's </think> to the turn's end; None where the thinking has no end, or nothing behind it."""
    end = _turn_end(rollout.roles, rollout.prompt_len)
    turn = rollout.tokens[rollout.prompt_len : end]
    if think_end not in turn:
        return None
    start = rollout.prompt_len + turn.index(think_end) + 1
    return (start, end) if start < end else None


def _behind_observation(rollout: Trajectory, window: int) -> Fork | None:
    roles, first = rollout.roles, rollout.prompt_len
    starts = [i for i in range(first + 1, len(roles)) if roles[i] == SAMPLED and roles[i - 1] == OBSERVATION]
    if not starts:
        return None
    _, before = _uncertainty(rollout, first, min(first + window, _turn_end(roles, first)))
    forks = []
    for start in starts:
        confidence, entropy = _uncertainty(rollout, start, min(start + window, _turn_end(roles, start)))
        forks.append(Fork(start, confidence, entropy, entropy - before))
    best = max(forks, key=lambda fork: fork.rise)  # the earliest of equal ones
    return best if best.rise > 0 else None


def _turn_end(roles: Sequence[int], start: int) -> int:
    return next((i for i in range(start, len(roles)) if roles[i] != SAMPLED), len(roles))


def _uncertainty(rollout: Trajectory, start: int, end: int) -> tuple[float, float]:
    """(mean exp(logprob), mean entropy) of tokens [start, end), all of them sampled."""
    logprobs = [lp for lp in rollout.logprobs[start:end] if lp is not None]
    entropies = [h for h in rollout.entropies[start:end] if h is not None]
    if len(logprobs) != end - start or len(entropies) != len(logprobs):
        raise ValueError(f"trajectory {rollout.id}: tokens {start}:{end} are judged, and some of them were not sampled")
    return math.fsum(map(math.exp, logprobs)) / len(logprobs), math.fsum(entropies) / len(entropies)

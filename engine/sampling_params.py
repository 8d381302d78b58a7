"""How a sequence is continued."""

import hashlib
import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """vLLM's names. `seed` keys the noise of one branch: the same seed at the same position draws the same noise."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = 16
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    detokenize: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            ("n", self.n, self.n >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "a finite number, 0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None"),
        )
        for name, value, valid, wanted in checks:
            if not valid:
                raise ValueError(f"SamplingParams.{name} is {value}; it must be {wanted}")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))


def derive_seed(*path: int | str) -> int:
    """A 63-bit seed from the path of a branch, such as (run seed, step, question, rollout, resample)."""
    digest = hashlib.blake2b(repr(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

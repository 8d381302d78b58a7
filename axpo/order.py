"""The order in which a run goes through its data."""

from functools import cache

import numpy as np


def shuffled(seed: int, position: int, size: int) -> int:
    """Which of `size` items stands at `position` 0, 1, … of a run: every epoch is a new permutation."""
    return int(_epoch(seed, position // size, size)[position % size])


@cache
def _epoch(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)

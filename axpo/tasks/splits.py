"""What the embedded tasks that make their own questions share: sizes, and which things are held out."""

import hashlib

import numpy as np

from axpo.grading import Kind
from axpo.tasks import SPLITS, Split

HELDOUT_PARTS = 5  # one of so many is held out


class GeneratedTask:
    """Sizes and random streams of a task that makes questions from (split, index); answers must be equal.

    shares: parameters that are shares, by name.

    Raises:
        ValueError: a split without a question, or a share outside of 0 to 1.
    """

    name: str
    key: int
    """Of the task's random streams."""

    def __init__(self, train_size: int, heldout_size: int, **shares: float):
        for field, value in (("train_size", train_size), ("heldout_size", heldout_size)):
            if value < 1:
                raise ValueError(f"{field} is {value}; it must be at least 1")
        for field, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{field} is {share}; it must be between 0 and 1")
        self._sizes = dict(zip(SPLITS, (train_size, heldout_size), strict=True))

    def size(self, split: Split) -> int:
        if split not in self._sizes:
            raise ValueError(f"unknown split {split!r}; there is: {', '.join(SPLITS)}")
        return self._sizes[split]

    def kinds(self) -> set[Kind]:
        return {"exact"}

    def random(self, split: Split, index: int) -> np.random.Generator:
        """The stream that question `index` is drawn from; IndexError when there is no such question."""
        if not 0 <= index < self.size(split):
            raise IndexError(f"{self.name}/{split} has questions 0 to {self.size(split) - 1}, not {index}")
        return np.random.default_rng([self.key, SPLITS.index(split), index])


def is_heldout(thing: str) -> bool:
    """Whether questions about `thing` are asked in the held-out split alone, or in training alone."""
    return hashlib.sha256(thing.encode()).digest()[0] % HELDOUT_PARTS == 0

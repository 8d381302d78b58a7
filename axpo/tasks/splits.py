"""What the embedded tasks that make their own questions share: sizes, and which things are held out."""

import hashlib

import numpy as np

from axpo.tasks import SPLITS, Split

HELDOUT_PARTS = 5  # one of so many is held out


class Sizes:
    """Number of questions of each split.

    Raises:
        ValueError: a split without a question.
    """

    def __init__(self, train_size: int, heldout_size: int):
        for field, value in (("train_size", train_size), ("heldout_size", heldout_size)):
            if value < 1:
                raise ValueError(f"{field} is {value}; it must be at least 1")
        self._sizes = dict(zip(SPLITS, (train_size, heldout_size), strict=True))

    def __getitem__(self, split: Split) -> int:
        if split not in self._sizes:
            raise ValueError(f"unknown split {split!r}; there is: {', '.join(SPLITS)}")
        return self._sizes[split]

    def random(self, key: int, name: str, split: Split, index: int) -> np.random.Generator:
        """The stream that question `index` is drawn from; IndexError when there is no such question."""
        if not 0 <= index < self[split]:
            raise IndexError(f"{name}/{split} has questions 0 to {self[split] - 1}, not {index}")
        return np.random.default_rng([key, SPLITS.index(split), index])


def is_heldout(thing: str) -> bool:
    """Whether questions about `thing` are asked in the held-out split alone, or in training alone."""
    return hashlib.sha256(thing.encode()).digest()[0] % HELDOUT_PARTS == 0

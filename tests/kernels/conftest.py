"""Fixtures of the kernel tests: fresh random inputs, and uninitialised memory that shows."""

import secrets
from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    """A freshly seeded generator; the seed is printed, so pytest shows it when the test fails."""
    seed = secrets.randbits(31)
    print(f"seed = {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every torch.empty with NaN (integers with their largest value) for the length of a test."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture
def with_threads() -> Iterator[Callable]:
    """with_threads(n, f): f() run on n threads."""
    before = torch.get_num_threads()

    def run(n: int, f: Callable):
        torch.set_num_threads(n)
        return f()

    yield run
    torch.set_num_threads(before)

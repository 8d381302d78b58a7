"""Intervals by a bootstrap over questions, since a question's samples are not independent."""

import numpy as np

_RESAMPLES = 4000


def question_counts(questions: int) -> np.ndarray:
    """How often each of `questions` is drawn in each resample: [4000, questions], the same for the same number.

    That is what pairs two evaluations of the same questions.
    """
    chances = np.full(questions, 1 / questions)
    return np.random.default_rng(0).multinomial(questions, chances, size=_RESAMPLES)


def interval(draws: np.ndarray) -> tuple[float | None, float | None]:
    """Ends of the 95 % interval of a measure's bootstrap draws; None where none of them is a number."""
    known = draws[np.isfinite(draws)] if draws.size else draws
    if not known.size:
        return None, None
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)

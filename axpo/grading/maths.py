"""Answers that are mathematics: math-verify, in worker processes that are killed when they take too long.

Equality of expressions is undecidable, and a hostile one (a power tower) holds a computer-algebra system forever: it
never runs in the trainer's process, and always on our own clock.
"""

import multiprocessing
import re
import threading
from collections.abc import Iterable
from concurrent.futures import TimeoutError as FutureTimeout

from pebble import ProcessPool

from axpo.grading.text import exact

TIMEOUT_S = 5.0
MEMORY_BYTES = 2 << 30
_LONGEST = 400  # characters of an expression
_SEVERAL = re.compile(r"\\\\|&|\\[][]")
"""Rows, columns and ends of formulas outside a matrix: several answers, of which the library reads one."""


class MathWorkers:
    """Compares expressions on `count` processes, which start when the first is wanted. Thread-safe."""

    def __init__(self, count: int = 2):
        self._count = count
        self._pool: ProcessPool | None = None
        self._lock = threading.Lock()

    def equal(self, given: str, answers: Iterable[str], timeout: float = TIMEOUT_S) -> tuple[float, str | None]:
        """(1.0 if `given` equals an answer, what went wrong)."""
        answers = list(answers)
        if exact(given, answers):
            return 1.0, None
        if _SEVERAL.search(given) and "\\begin" not in given:
            return 0.0, None
        if len(given) > _LONGEST:
            return 0.0, "the answer is too long to compare"
        future = self._started().schedule(_any_equal, args=(given, answers), timeout=timeout)
        try:
            return float(future.result()), None
        except (FutureTimeout, TimeoutError):
            return 0.0, "the answer takes too long to compare"
        except Exception as error:  # the worker was killed for its memory, or the library failed
            return 0.0, f"the answer cannot be compared: {type(error).__name__}"

    def close(self) -> None:
        with self._lock:
            if self._pool is not None:
                self._pool.stop()
                self._pool.join()
                self._pool = None

    def _started(self) -> ProcessPool:
        with self._lock:
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPool(max_workers=self._count, max_tasks=500, initializer=_limit, context=context)
            return self._pool


def _limit() -> None:
    """Of a new worker, which also imports what it needs, so that no answer's time pays for it."""
    import logging
    import resource
    import signal

    import math_verify  # noqa: F401

    logging.disable(logging.WARNING)  # it warns that it keeps no time, each time
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's matter
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _any_equal(given: str, answers: list[str]) -> bool:
    """In the worker. Plain text such as 12:30 is wrongly equal to 12:45 unless it is marked as mathematics."""
    from math_verify import parse, verify

    def read(text: str) -> list:
        return parse(f"${text.strip().strip('$')}$", parsing_timeout=0)  # no alarm: the clock is outside

    try:
        expression = read(given)
        return bool(expression) and any(verify(read(a), expression, timeout_seconds=0) for a in answers)
    except RecursionError:
        return False

"""A run that is asked to end early: by SIGTERM, by SIGUSR1 (Slurm's usual warning), or by its time limit."""

import signal
import time

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """Remembers that this process was asked to end; the run looks at it where it can stop and save.

    Made on the main thread, before anything slow: from then on the signals no longer kill the process.

    Args:
        time_limit_s: seconds from now after which to stop; None for no limit.
    """

    def __init__(self, time_limit_s: float | None = None):
        self._limit = time_limit_s
        self._begun = time.monotonic()
        self._signal: signal.Signals | None = None
        for number in SIGNALS:
            signal.signal(number, self._remember)

    @property
    def reason(self) -> str | None:
        """'SIGTERM', 'SIGUSR1' or 'run.time_limit' once there is one; it does not change back to None."""
        if self._signal is not None:
            return self._signal.name
        if self._limit is not None and time.monotonic() - self._begun >= self._limit:
            return "run.time_limit"
        return None

    def requested(self) -> bool:
        return self.reason is not None

    def _remember(self, number: int, _: object) -> None:
        self._signal = self._signal or signal.Signals(number)

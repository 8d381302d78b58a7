"""Tavily's search API: cached on disk, retried, and no faster than allowed."""

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import diskcache
import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from axpo.paths import cache_directory
from axpo.tools.search import Hit, SearchError
from axpo.web import post

ATTEMPTS = 4
MAX_WAIT_S = 20.0
_BROKEN_S = 30.0
"""After all attempts of a query failed, others fail at once for so long: an outage must not hold up the run."""


class _Again(SearchError):
    """Worth another attempt: an outage or a rate limit. `after` is what the server asked us to wait, in seconds."""

    def __init__(self, message: str, after: float | None = None):
        super().__init__(message)
        self.after = after


class Tavily:
    """POST /search. Thread-safe; the limits hold for all threads together.

    cache_dir: where answers are kept; empty: the user's cache folder.
    """

    def __init__(
        self,
        key: str,
        *,
        base_url: str,
        exclude_domains: Sequence[str],
        cache_dir: str,
        queries_per_minute: int,
        timeout_s: float,
    ):
        self._exclude = list(exclude_domains)
        self._url = base_url.rstrip("/") + "/search"
        self._headers = {"Authorization": f"Bearer {key}"}
        self._timeout_s = timeout_s
        self._cache = diskcache.Cache(str(cache_directory(cache_dir, "search")))
        self._limit = _RateLimit(queries_per_minute)
        self._broken_until = 0.0

    def search(self, query: str, count: int) -> list[Hit]:
        request = {"query": query[:400], "max_results": count, "exclude_domains": self._exclude}
        name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        answer = self._cache.get(name)
        if answer is None:
            if time.monotonic() < self._broken_until:
                raise SearchError("the service is not available now")
            try:
                answer = self._retrying()(self._ask, request)
            except _Again:
                self._broken_until = time.monotonic() + _BROKEN_S
                raise
            self._cache.set(name, answer)
        return _hits(answer)

    def close(self) -> None:
        self._cache.close()

    def _retrying(self) -> Retrying:
        backoff = wait_random_exponential(multiplier=0.5, max=MAX_WAIT_S)

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            after = error.after if isinstance(error, _Again) else None
            return backoff(state) if after is None else min(after, MAX_WAIT_S)

        return Retrying(
            retry=retry_if_exception_type(_Again), stop=stop_after_attempt(ATTEMPTS), wait=wait, reraise=True
        )

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._limit.wait()
        try:
            response = post(self._url, request, self._headers, self._timeout_s)
        except httpx.TransportError as error:
            unreachable = _Again(f"the service cannot be reached: {type(error).__name__}")
            unreachable.timed_out = isinstance(error, httpx.TimeoutException)
            raise unreachable from error
        status = response.status_code
        if status == 429:
            raise _Again("the service's rate limit is reached", _seconds(response.headers.get("retry-after")))
        if status >= 500:
            raise _Again(f"the service has an error of its own ({status})")
        if status in (401, 403):
            raise SearchError("the service refuses the API key")
        if status != 200:
            raise SearchError(f"the service refuses the query ({status})")
        try:
            answer = response.json()
        except (ValueError, RecursionError) as error:
            raise _Again("the service's answer is not JSON") from error
        _hits(answer)
        return answer


class _RateLimit:
    """At most `per_minute` passes in any minute."""

    def __init__(self, per_minute: int):
        self._per_minute = per_minute
        self._times: deque[float] = deque()
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:  # held while waiting: those behind could not pass either
            while len(self._times) >= self._per_minute:
                left = self._times[0] + 60 - time.monotonic()
                if left > 0:
                    time.sleep(left)
                else:
                    self._times.popleft()
            self._times.append(time.monotonic())


def _hits(answer: Any) -> list[Hit]:
    try:
        return [Hit(str(r["title"]), str(r["url"]), str(r.get("content", ""))) for r in answer["results"]]
    except (TypeError, KeyError, AttributeError) as error:
        raise SearchError("the service's answer has an unknown form") from error


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text or ""))
    except ValueError:
        return None

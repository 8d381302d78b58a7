"""A turn's tool calls on worker threads: no tool's fault ends the run, and none that hangs holds it up."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol

from PIL import Image

from axpo.images import check_image
from axpo.tools import Tool, ToolResult
from axpo.tools.parse import ParsedCall

_IDLE_S = 10.0
"""After which a worker thread without work ends."""


class Workers:
    """At most `count` threads that work at once, which the end of the process does not wait for.

    A thread cannot be stopped: what does not come back is given up, and another thread takes its place.
    """

    def __init__(self, count: int):
        self._count, self._threads = count, 0
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()

    def submit(self, work: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        with self._lock:
            self._jobs.put((future, work))
            self._start()
        return future

    def give_up(self, future: "Future[Any]", result: Any) -> None:
        """Ends `future`, whose work has begun, with `result`; nothing where it has ended by itself."""
        with self._lock:
            if not future.done():
                future.set_result(result)
                self._threads -= 1
                self._start()

    def _start(self) -> None:
        if self._threads < self._count:
            self._threads += 1
            threading.Thread(target=self._serve, name="tool", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                future, work = self._jobs.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._lock:
                    if self._jobs.empty():
                        self._threads -= 1
                        return
                continue
            result, failed = None, None
            try:
                result = work()
            except BaseException as error:
                failed = error
            with self._lock:
                if future.done():  # given up: another thread has this one's place
                    return
                if failed is None:
                    future.set_result(result)
                else:
                    future.set_exception(failed)


class Caller(Protocol):
    """Whose calls they are: a branch."""

    images: list[Image.Image]
    sessions: dict[str, Tool]

    def session(self, tool: Tool) -> Tool: ...


class TurnCalls:
    """The calls of one turn, made one after another when it is called; an image is visible to the next call.

    shorten: cuts a response's text to what the model may be shown.
    """

    def __init__(
        self, caller: Caller, calls: Sequence[ParsedCall], tools: dict[str, Tool], shorten: Callable[[str], str]
    ):
        self._caller, self._calls, self._tools, self._shorten = caller, calls, tools, shorten
        self._results: list[ToolResult] = []
        self._begun = 0.0
        self._given_up = False

    def __call__(self) -> list[ToolResult]:
        self._begun = time.monotonic()
        images = list(self._caller.images)
        for call in self._calls:
            result = self._make(call, images)
            if self._given_up:
                break
            images += result.images
            self._results.append(result)
        return self._results

    def left(self, timeout: float) -> float:
        """Seconds until its time is up; all of them before it has begun."""
        return timeout - (time.monotonic() - self._begun) if self._begun else timeout

    def give_up(self, timeout: float) -> list[ToolResult]:
        """What there is, and failures instead of the call that hangs and of those behind it. Its session is lost."""
        self._given_up = True
        results = list(self._results)
        hangs, *behind = self._calls[len(results) :] or [None]
        if hangs is None:
            return results
        self._caller.sessions.pop(hangs.name or "", None)
        said = f"the tool {hangs.name} did not answer: a turn's calls may take {timeout:g} s"
        failed = ToolResult.failure(said, timed_out=True)
        results.append(replace(failed, seconds=time.monotonic() - self._begun))
        return results + [
            ToolResult.failure(f"not run: the tool {hangs.name} before it did not answer") for _ in behind
        ]

    def _make(self, call: ParsedCall, images: list[Image.Image]) -> ToolResult:
        if call.error is not None or call.name is None or call.arguments is None:
            return ToolResult.failure(call.error or "the tool call is malformed")
        begun = time.perf_counter()
        try:
            tool = self._caller.session(self._tools[call.name])
            result = _checked(tool.call(call.arguments, images))
            if self._given_up and tool is not self._tools[call.name]:  # nobody else may go on with it
                self._caller.sessions.pop(call.name, None)
                tool.close()
        except (Exception, SystemExit) as error:  # a fault of the tool costs this call, not the run
            result = ToolResult.failure(f"the tool {call.name} failed: {type(error).__name__}: {_said(error)}")
        text = result.text.encode(errors="replace").decode()  # half a surrogate pair is no text
        return replace(result, text=self._shorten(text), seconds=time.perf_counter() - begun)


def _checked(result: Any) -> ToolResult:
    """What a tool returned, if it can be shown; TypeError or ValueError where it cannot."""
    if not isinstance(result, ToolResult):
        raise TypeError(f"it returned {type(result).__name__}, not a ToolResult")
    if not isinstance(result.text, str) or not all(isinstance(image, Image.Image) for image in result.images):
        raise TypeError("its result must have text that is a str, and images that are PIL images")
    for number, image in enumerate(result.images):
        check_image(image, f"image {number} of the result")
    return result


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a hostile __str__
        return "(its message cannot be shown)"

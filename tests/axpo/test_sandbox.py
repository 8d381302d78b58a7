"""Hostile programs against the python tool's sandbox: all contained, the run unharmed, the model told."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from axpo.tools.python import Python, PythonSession
from axpo.tools.python.host import SandboxError, Zygote

PICTURE = Image.new("RGB", (48, 32), (200, 30, 10))


@pytest.fixture(scope="module")
def tool() -> Iterator[Python]:
    tool = Python(memory_mb=256, cpu_seconds=20)
    yield tool
    tool.close()


@pytest.fixture
def session(tool: Python) -> Iterator[PythonSession]:
    session = tool.session()
    yield session
    session.close()


LIBC = "import ctypes, os, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
ENDLESS = "while True: pass"

# name, program, and what the model is told: a part of the text, or of one of several texts.
# ruff: noqa: E501
HOSTILE: list[tuple[str, str, tuple[str, ...]]] = [
    # processes
    ("fork bomb", "import os\nwhile True: os.fork()", ("Operation not permitted",)),
    ("fork of libc", LIBC + "print(libc.fork(), os.strerror(ctypes.get_errno()))", ("-1 Operation not permitted",)),
    ("vfork", LIBC + "print(libc.syscall(58), os.strerror(ctypes.get_errno()))", ("-1 Operation not permitted",)),
    ("clone", LIBC + "print(libc.syscall(56, 17, 0, 0, 0, 0))", ("-1",)),
    ("clone into a user namespace", LIBC + "print(libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0))", ("-1",)),
    ("clone3", LIBC + "print(libc.syscall(435, 0, 0), os.strerror(ctypes.get_errno()))", ("-1 Function not impl",)),
    ("multiprocessing", "import multiprocessing as m\np = m.Process(target=print)\np.start()", ("not permitted",)),
    ("subprocess", "import subprocess\nsubprocess.run(['/bin/ls'])", ("not permitted",)),
    ("posix_spawn", "import os\nos.posix_spawn('/bin/ls', ['ls'], {})", ("not permitted",)),
    ("exec", "import os\nos.execv('/bin/sh', ['sh', '-c', 'id'])", ("not permitted",)),
    ("shell", "import os\nprint(os.system('id') == 0)", ("False",)),
    ("threads", "import threading\nwhile True: threading.Thread(target=print).start()", ("can't start new thread",)),
    # memory
    ("memory bomb", "x = bytearray(4 << 30)", ("MemoryError",)),
    ("memory bomb in steps", "x = []\nwhile True: x.append(bytearray(1 << 24))", ("MemoryError",)),
    ("memory of numpy", "import numpy as np\nnp.ones((1 << 16, 1 << 16))", ("MemoryError", "allocate")),
    ("memory doubling string", "s = 'x'\nwhile True: s += s", ("MemoryError",)),
    ("anonymous files", LIBC + "print(libc.syscall(319, b'x', 0))", ("-1",)),
    ("shared memory segments", LIBC + "print(libc.shmget(0, 1 << 30, 0o1600))", ("-1",)),
    ("shared mappings", "import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(1000)]", ("Cannot allocate",)),
    # time
    ("endless loop", ENDLESS, ("longer than 1 s",)),
    ("sleep", "import time\ntime.sleep(1000)", ("longer than 1 s",)),
    ("loop that catches", "while True:\n try:\n  while True: pass\n except BaseException: pass", ("could not be interr", "longer than 1 s")),
    ("loop without the alarm", "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0)\n" + ENDLESS, ("could not be",)),
    ("loop that ignores", "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\n" + ENDLESS, ("could not be",)),
    ("power tower", "9 ** 9 ** 9", ("could not be interrupted", "longer than", "MemoryError")),
    ("regular expression", "import re\nre.match(r'(a+)+$', 'a' * 64 + 'b')", ("could not be interrupted", "longer than")),
    # network
    ("tcp", "import socket\nsocket.create_connection(('1.1.1.1', 80), 1)", ("not permitted",)),
    ("udp", "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)", ("not permitted",)),
    ("ipv6", "import socket\nsocket.socket(socket.AF_INET6)", ("not permitted",)),
    ("netlink", "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", ("not permitted",)),
    ("unix socket", "import socket\nsocket.socket(socket.AF_UNIX)", ("not permitted",)),
    ("urllib", "import urllib.request as u\nu.urlopen('http://example.org')", ("rror",)),
    ("name look-up", "import socket\nsocket.gethostbyname('example.org')", ("rror",)),
    ("io_uring", LIBC + "print(libc.syscall(425, 8, 0), os.strerror(ctypes.get_errno()))", ("-1 Operation not",)),
    # reads
    ("passwords", "open('/etc/shadow').read()", ("No such file",)),
    ("home", "import os\nos.listdir('/home')", ("No such file",)),
    ("the project", f"open({str(Path('README.md').resolve())!r})", ("No such file",)),
    ("environment", "import os\nprint(sorted(os.environ))", ("LANG",)),
    ("proc self", "open('/proc/self/environ').read()", ("No such file",)),
    ("proc of pid 1", "import os\nprint(os.listdir('/proc'))", ("[]",)),
    ("proc root", "import os\nos.listdir('/proc/1/root')", ("No such file",)),
    ("symlink out", "import os\nos.symlink('/etc/shadow', '/tmp/x')\nopen('/tmp/x').read()", ("No such file",)),
    ("dots out", "open('/tmp/' + '../' * 20 + 'etc/shadow').read()", ("No such file",)),
    ("disk device", "open('/dev/vda', 'rb')", ("No such file",)),
    ("kernel memory", "open('/dev/mem', 'rb')", ("No such file",)),
    # writes
    ("write to the root", "open('/x', 'w')", ("Read-only file system",)),
    ("write to the interpreter", "import os\nopen(os.__file__, 'w')", ("Read-only file system",)),
    ("write to /dev", "open('/dev/x', 'w')", ("Read-only file system",)),
    ("write to /dev/shm", "open('/dev/shm/x', 'w')", ("Read-only file system",)),
    ("full /tmp", "[open(f'/tmp/{i}', 'wb').write(bytes(1 << 22)) for i in range(50)]", ("No space left",)),
    ("large file", "open('/tmp/x', 'wb').write(bytes(1 << 25))", ("File too large", "No space left")),
    ("a million files", "for i in range(10**6): open(f'/tmp/{i}', 'w').close()", ("No space left",)),
    ("a deep directory", "import os\nwhile True:\n os.mkdir('x')\n os.chdir('x')", ("No space left", "longer than")),
    ("open files", "x = [open('/dev/null') for _ in range(10**5)]", ("Too many open files",)),
    ("device node", "import os, stat\nos.mknod('/tmp/x', stat.S_IFBLK | 0o600, os.makedev(254, 0))", ("not permitted",)),
    # privileges
    ("root", "import os\nos.setuid(0)", ("not permitted",)),
    ("mount", LIBC + "print(libc.mount(b'x', b'/tmp', b'tmpfs', 0, None))", ("-1",)),
    ("unmount /proc", LIBC + "print(libc.umount2(b'/proc', 2))", ("-1",)),
    ("unshare", LIBC + "print(libc.unshare(0x10000000))", ("-1",)),
    ("chroot", "import os\nos.chroot('/tmp')", ("not permitted",)),
    ("ptrace", LIBC + "print(libc.ptrace(16, 1, 0, 0))", ("-1",)),
    ("read another process", LIBC + "print(libc.syscall(310, 1, 0, 0, 0, 0, 0))", ("-1",)),
    ("kernel module", LIBC + "print(libc.syscall(175, 0, 0, b''))", ("-1",)),
    ("keyring", LIBC + "print(libc.syscall(248, b'user', b'x', b'y', 1, -3))", ("-1",)),
    ("bpf", LIBC + "print(libc.syscall(321, 0, 0, 0))", ("-1",)),
    ("host name", "import socket\nsocket.sethostname('x')", ("not permitted",)),
    ("clock", "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)", ("not permitted",)),
    ("raise limits", "import resource as r\nr.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY,) * 2)", ("rror",)),
    ("loosen the filter", LIBC + "print(libc.prctl(22, 0, 0, 0, 0))", ("-1",)),
    # signals, and its own kernel
    ("kill the parent", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nprint('alive')", ("alive", "rror")),
    ("kill everybody", "import os, signal\nos.kill(-1, signal.SIGKILL)", ("No such process", "rror")),
    ("kill itself", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\nprint('alive')", ("alive", "stopped")),
    ("stop itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nprint('on')", ("on", "could not be interr")),
    ("segmentation fault", "import ctypes\nctypes.string_at(0)", ("kernel was stopped",)),
    ("abort", "import os\nos.abort()", ("kernel was stopped",)),
    ("exit", "import os\nos._exit(0)", ("kernel was stopped",)),
    ("deep recursion", "def f(): f()\nf()", ("RecursionError",)),
    ("crash of the parser", "'(' * 100000 and eval('(' * 100000)", ("rror",)),
    ("exec of itself", "exec('x = 1\\n' * 10**6)", ("", )),
    # output, and the answer's channel
    ("giant output", "while True: print('x' * 10**6)", ("File too large", "longer than", "cut")),
    ("giant raw output", "import os\nwhile True: os.write(1, b'x' * 10**6)", ("File too large", "longer than")),
    ("forged answer", "import os\nos.write(3, b'\\xff' * 64)", ("is no answer", "stopped")),
    ("forged large answer", "import os\nos.write(3, b'\\xff\\xff\\x0f\\0' + bytes(4))", ("no answer", "interrupted", "stop")),
    ("forged types", ("import os, json\nm = json.dumps({'blobs': [-1], 'ok': 3}).encode()\n"
      "os.write(3, len(m).to_bytes(4, 'little') + bytes(4) + m)"), ("is no answer",)),
    ("closed channel", "import os\nos.closerange(0, 64)", ("kernel was stopped",)),
    ("trickle", "import os, signal\nsignal.setitimer(signal.ITIMER_REAL, 0)\nos.write(3, b'\\x10\\0\\0\\0')\n" + ENDLESS,
     ("could not be",)),
    ("poisoned builtins", "import builtins, sys\nbuiltins.len = None\nsys.modules['json'].dumps = None", ("stopped", "")),
    ("poisoned picture", "import wire\nwire.send = lambda *a: None", ("could not be interrupted",)),
    ("image bomb", "from PIL import Image\nImage.new('L', (60000, 60000)).show()", ("MemoryError",)),
    ("many figures", "import matplotlib.pyplot as plt\nfor _ in range(30):\n plt.figure(figsize=(1, 1))\nplt.show()", ("",)),
]  # fmt: skip


@pytest.mark.parametrize(("program", "told"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_a_hostile_program_is_contained(session: PythonSession, program: str, told: tuple[str, ...]) -> None:
    check_contained(session, program, told)


def check_contained(session: PythonSession, program: str, told: tuple[str, ...]) -> None:
    """The program ends in time, says one of `told`, and leaves a kernel that works or is made anew."""
    begun = time.monotonic()
    result = session.call({"code": program, "timeout": 1}, [PICTURE])
    assert time.monotonic() - begun < 30
    assert any(text in result.text for text in told), result.text[-600:]
    assert len(result.text) < 20_000 and len(result.images) <= 8
    after = session.call({"code": "print(6 * 7, len(_pil_images), _pil_images[0].size)"}, [PICTURE])
    assert after.text == "42 1 (48, 32)\n" or not after.ok, "a program may break its own kernel, and only that"
    if not after.ok:
        session.close()
        assert session.call({"code": "6 * 7"}, [PICTURE]).text == "42\n"


def test_a_broken_kernel_costs_nobody_else_anything(tool: Python) -> None:
    neighbour, hostile = tool.session(), tool.session()
    neighbour.call({"code": "x = 5\nopen('/tmp/mine', 'w').write('mine')"}, [])
    assert "stopped" in hostile.call({"code": "import os\nos.abort()"}, []).text
    assert "No such file" in hostile.call({"code": "open('/tmp/mine')"}, []).text, "another trajectory's files"
    assert "NameError" in hostile.call({"code": "x"}, []).text, "another trajectory's variables"
    assert neighbour.call({"code": "x, open('/tmp/mine').read()"}, []).text == "(5, 'mine')\n"
    hostile.close()
    neighbour.close()


def test_a_session_is_a_notebook(session: PythonSession) -> None:
    assert session.call({"code": "def f(n):\n    return n + 1\nx = f(1)"}, []).text == "(no output)"
    assert session.call({"code": "print('a')\nx += 1\nx"}, []).text == "a\n3\n"
    failed = session.call({"code": "y = 1\n\nx / 0"}, [])
    assert not failed.ok and failed.error == "ZeroDivisionError: division by zero"
    assert 'File "<cell 3>", line 3' in failed.text and "x / 0" in failed.text and "kernel.py" not in failed.text
    assert session.call({"code": "y + x"}, []).text == "4\n"
    assert "SyntaxError" in session.call({"code": "x ="}, []).text


def test_images_come_and_go(session: PythonSession) -> None:
    grey = Image.new("L", (9, 5), 77)
    first = session.call(
        {"code": "[i.size for i in _pil_images], _images[0].shape, _pil_images[0].getpixel((0, 0))"}, [PICTURE]
    )
    assert first.text == "([(48, 32)], (32, 48, 3), (200, 30, 10))\n"
    second = session.call({"code": "_pil_images[1].mode, _images[1].max()"}, [PICTURE, grey])
    assert second.text.startswith("('L', ") and "77" in second.text
    shown = session.call({"code": "_pil_images[0].show()\n_pil_images[1].show()"}, [PICTURE, grey])
    assert [image.size for image in shown.images] == [(48, 32), (9, 5)] and shown.images[0].getpixel((3, 3)) == (
        200,
        30,
        10,
    )
    plot = session.call({"code": "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"}, [PICTURE, grey])
    assert plot.ok and len(plot.images) == 1 and plot.images[0].size == (640, 480)
    large = session.call({"code": "from PIL import Image\nImage.new('RGB', (9000, 300)).show()"}, [PICTURE, grey])
    assert large.images[0].size[0] == 2048


def test_no_kernel_is_left(tool: Python) -> None:
    def children() -> int:
        return sum("zygote.py" in _command(process) for process in Path("/proc").iterdir() if process.name.isdigit())

    def settled(wanted: int) -> bool:
        deadline = time.monotonic() + 20
        while children() != wanted and time.monotonic() < deadline:
            time.sleep(0.05)
        return children() == wanted

    first = tool.session()
    first.call({"code": "1"}, [])  # the zygote runs
    with_one, files = children(), len(list(Path("/proc/self/fd").iterdir()))
    first.close()
    assert settled(with_one - 1)
    sessions = [tool.session() for _ in range(40)]
    workers = [threading.Thread(target=s.call, args=({"code": "x = 1"}, [PICTURE])) for s in sessions]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert children() == with_one + 39
    for s in sessions:
        s.close()
    assert settled(with_one - 1) and len(list(Path("/proc/self/fd").iterdir())) == files - 1


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def test_the_sandbox_restarts_and_ends() -> None:
    zygote = Zygote("bubblewrap", 1 << 28, 10)
    number, sock = zygote.spawn()
    assert zygote._process is not None
    zygote._process.kill()
    zygote._process.wait()
    zygote.spawn()[1].close()
    sock.settimeout(10)
    assert sock.recv(1) == b"", "its kernels ended with it"
    sock.close()
    zygote.kill(number)
    process = zygote._process
    zygote.close()
    assert process.poll() is not None
    with pytest.raises(SandboxError, match="closed"):
        zygote.spawn()


def test_isolation_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axpo.tools.python.host.bubblewrap", lambda: None)
    with pytest.raises(ValueError, match=r"python.sandbox = 'bubblewrap': bubblewrap is not installed .*apt install"):
        Python()


def test_without_a_sandbox_it_runs_and_says_so_loudly(caplog: pytest.LogCaptureFixture) -> None:
    tool = Python(sandbox="none")
    assert "UNPROTECTED" in caplog.text
    session = tool.session()
    assert session.call({"code": "6 * 7"}, []).text == "42\n"
    session.close()
    tool.close()

"""Hostile programs against what surrounds them in their own kernel, and by the rarer ways out of it."""

import pytest

from axpo.tools.python import PythonSession
from tests.axpo.test_sandbox import LIBC, check_contained, session, tool  # noqa: F401 - fixtures

FRAME = (
    "import os, json\ndef reply(**more):\n m = json.dumps({'ok': True, 'text': 'forged', 'error': None, 'images': [], "
    "'blobs': [], **more}).encode()\n os.write(3, len(m).to_bytes(4, 'little') + bytes(4) + m)\n"
)
ERRNO = ", os.strerror(ctypes.get_errno()))"
# Machine code that enters the kernel as a 32-bit program would: mov eax, 2 (fork); int 0x80; ret.
INT80 = (
    "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(b'\\xb8\\x02\\0\\0\\0\\xcd\\x80\\xc3')\n"
    "print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())"
)

# ruff: noqa: E501 - a table
HOSTILE: list[tuple[str, str, tuple[str, ...]]] = [
    # rarer system calls
    ("userfaultfd", LIBC + "print(libc.syscall(323, 0)" + ERRNO, ("-1 Operation not permitted",)),
    ("keyctl", LIBC + "print(libc.syscall(250, 0, -3, 0)" + ERRNO, ("-1 Operation not permitted",)),
    ("memfd and exec", LIBC + "fd = os.open('/tmp/x', os.O_CREAT | os.O_RDWR, 0o755)\nos.write(fd, open('/usr/bin/env', 'rb').read())\nlibc.fexecve(fd, (ctypes.c_char_p * 2)(b'x', None), (ctypes.c_char_p * 1)(None))\nprint(os.strerror(ctypes.get_errno()))", ("not permitted", "No such file")),
    ("execveat", LIBC + "print(libc.syscall(322, -100, b'/usr/bin/env', 0, 0, 0)" + ERRNO, ("-1 Operation not permitted",)),
    ("ptrace of a sibling", LIBC + "print([libc.ptrace(16, pid, 0, 0) for pid in range(1, 50)].count(-1))", ("49",)),
    ("32-bit entry of x32", LIBC + "print(libc.syscall(0x40000000 + 57)" + ERRNO, ("-1", "stopped")),
    ("32-bit entry of int 80", INT80, ("kernel was stopped", "-1")),
    ("inotify", LIBC + "print(libc.inotify_init1(0)" + ERRNO, ("-1 Operation not permitted",)),
    ("fanotify", LIBC + "print(libc.syscall(300, 0, 0)" + ERRNO, ("-1",)),
    ("secret memory", LIBC + "print(libc.syscall(447, 0)" + ERRNO, ("-1",)),
    ("landing in another namespace", LIBC + "print(libc.setns(0, 0)" + ERRNO, ("-1 Operation not permitted",)),
    ("vmsplice into pipes", "import os, fcntl\np = [os.pipe() for _ in range(40)]", ("Too many open files",)),
    ("priority", "import os\nos.nice(-20)", ("rror", "None")),
    ("outlive the parent", LIBC + "print(libc.prctl(1, 0, 0, 0, 0))\nwhile True: pass", ("longer than 1 s",)),
    ("signals by the thousand", "import signal\nsignal.signal(signal.SIGALRM, lambda *a: None)\nsignal.setitimer(signal.ITIMER_REAL, 1e-6, 1e-6)\nwhile True: pass", ("could not be",)),
    # files
    ("fill /dev/shm", "open('/dev/shm/x', 'wb').write(bytes(1 << 30))", ("Read-only", "No space")),
    ("hard link to the interpreter", "import os\nos.link(os.__file__, '/tmp/x')", ("Invalid cross-device link", "not permitted")),
    ("sparse file", "import os\nfd = os.open('/tmp/x', os.O_CREAT | os.O_RDWR)\nos.ftruncate(fd, 1 << 50)", ("File too large",)),
    ("sparse output", "import os\nos.ftruncate(1, 1 << 50)", ("File too large",)),
    ("circle of links", "import os\nos.symlink('/tmp/b', '/tmp/a')\nos.symlink('/tmp/a', '/tmp/b')\nopen('/tmp/a')", ("Too many levels",)),
    ("long names", "import os\nfor i in range(10**4): os.mkdir('/tmp/' + str(i).zfill(250))", ("No space left",)),
    ("a module in the way", "open('/tmp/json.py', 'w').write('raise SystemExit')\nimport sys\nsys.path.insert(0, '/tmp')\nsys.modules.pop('json')\nimport json", ("",)),
    # memory that is not there
    ("virtual memory of numpy", "import numpy as np\nx = [np.empty(1 << 32) for _ in range(100)]", ("MemoryError", "allocate")),
    ("memory by mmap", "import mmap\nmmap.mmap(-1, 1 << 45)", ("Cannot allocate",)),
    ("memory of integers", "x = 1 << (1 << 40)", ("MemoryError", "Overflow")),
    # the kernel's own functions
    ("closed descriptors, one by one", "import os\nfor fd in range(3): os.close(fd)\nprint('x')", ("rror", "", "stopped")),
    ("another file as output", "import os\nos.dup2(os.open('/dev/zero', os.O_RDONLY), 1)\nprint('x')", ("",)),
    ("closed stdout", "import sys\nsys.stdout.close()\nprint('x')", ("rror",)),
    ("forged whole answer", FRAME + "reply()\nprint('true')", ("no answer", "another call")),
    ("forged answers to come", FRAME + "for n in range(100): reply(number=n)", ("forged", "another call", "no answer")),
    ("forged answer with an image of nothing", FRAME + "reply(number=1, images=[[4096, 4096]])", ("no answer",)),
    ("endless nesting", "import os\nm = b'[' * 10**6\nos.write(3, len(m).to_bytes(4, 'little') + bytes(4) + m)", ("no answer",)),
    ("garbage and silence", "import os, signal\nsignal.setitimer(signal.ITIMER_REAL, 0)\nos.write(3, os.urandom(4096))\nwhile True: pass", ("no answer", "could not be")),
    ("huge message of an exception", "class E(Exception):\n def __str__(self): return 'x' * (1 << 27)\nraise E", ("E: xxx", "xxxx", "MemoryError", "cannot be shown")),
    ("exception that cannot be shown", "class E(Exception):\n def __str__(self): raise self\n __repr__ = __str__\nraise E", ("E",)),
    ("exception without a type", "class M(type):\n def __getattribute__(c, n): raise MemoryError\nclass E(Exception, metaclass=M): pass\nraise E", ("rror", "stopped", "cannot be shown")),
    ("endless repr", "class R:\n def __repr__(self): return repr(self)\nR()", ("RecursionError",)),
    ("repr that hangs", "class R:\n def __repr__(self):\n  while True: pass\nR()", ("longer than 1 s",)),
    ("deletion that hangs", "class D:\n def __del__(self):\n  while True: pass\nd = D()\ndel d", ("longer than", "CellTimeout", "could not be", "")),
    ("trace of the kernel", "import sys\ndef t(*a): raise KeyboardInterrupt\nsys.settrace(t)", ("", "stopped", "rror")),
    ("profile that loops", "import sys\ndef p(*a):\n while True: pass\nsys.setprofile(p)", ("longer than", "could not be", "stopped")),
    ("its own output function", "import sys\nk = next(m for m in sys.modules.values() if hasattr(m, '_printed'))\nk._printed = lambda n: 'x' * 10**9", ("stopped", "no answer")),
    ("its own runner", "import sys\nk = next(m for m in sys.modules.values() if hasattr(m, '_printed'))\nk._run = None\nk._collect_figures = lambda *a: [][1]", ("stopped",)),
    ("its own clock", "import time, signal\nsignal.setitimer = None\ntime.monotonic = lambda: 0\nwhile True: pass", ("longer than 1 s", "stopped")),
    ("an end that loops", "import atexit\ndef f():\n while True: pass\natexit.register(f)\nraise SystemExit", ("(no output)", "")),
    ("a limit of recursion", "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", ("stopped", "MemoryError", "RecursionError")),
    ("recursion in C", "x = []\nfor _ in range(10**6): x = [x]\nrepr(x)", ("RecursionError", "stopped")),
    ("poisoned images", "_pil_images.clear()\n_pil_images.append(3)\nfrom PIL import Image\nImage.frombytes = None", ("",)),
    ("a picture that lies", "from PIL import Image\nclass P(Image.Image):\n size = (10**9, 10**9)\n def convert(self, *a): return self\n def tobytes(self, *a): return b''\n def thumbnail(self, *a): pass\n def copy(self): return self\nP().show()", ("no answer", "stopped", "rror")),
]  # fmt: skip


@pytest.mark.parametrize(("program", "told"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_a_hostile_program_is_contained(session: PythonSession, program: str, told: tuple[str, ...]) -> None:  # noqa: F811
    check_contained(session, program, told)

"""Programs that try to slow down, watch or use up the host through what any process may do: locks, clocks, memory.

`docs/sandbox.md` lists them with what happens.
"""

from attack import CALL, attack

#: A C library call that maps 8 MB of memory shared with whoever has its file; `L.mmap(*SHARED)`.
MAP = CALL + "L.mmap.restype = ctypes.c_long\nL.munmap.argtypes = [ctypes.c_long, ctypes.c_long]\n"
LIBRARY = "import fcntl, os\nf, g = open(os.__file__), open(os.__file__)\n"
TAKEN = "try: {}\nexcept OSError: print(3)\nelse: print('no lock')"

#: Must end as a wrong answer or a runtime error.
PROGRAMS = {
    # A lock that was really taken conflicts with one through another descriptor.
    "lock a library": LIBRARY + TAKEN.format("fcntl.flock(f, 2); fcntl.flock(g, 2 | fcntl.LOCK_NB)"),
    "lock a library, by open file": LIBRARY
    + "import struct\nprint(3 if fcntl.fcntl(f, 37, struct.pack('hhqqi4x', 0, 0, 0, 0, 0)) else 'no')",
    "lease on a library": LIBRARY + "fcntl.fcntl(f, 1024, fcntl.F_RDLCK)\nprint(3)",
    "watch a folder of the host": attack(
        "import fcntl, os", "fcntl.fcntl(os.open(os.path.dirname(os.__file__), 0), 1026, 0x3F)"
    ),
    # A real flush of a pipe fails.
    "flush the host's files": "import os\n"
    "try: os.fsync(os.pipe()[0])\nexcept OSError: print(3)\nelse: print('no flush')",
    "drop the host's cache": attack("import os", "os.posix_fadvise(os.open(os.__file__, 0), 0, 0, 4)"),
    "shared memory without a mapping": MAP + "for _ in range(64):\n    a = L.mmap(0, 8 << 20, 3, 0x21, -1, 0)\n"
    "    if a == -1: print('refused'); break\n    ctypes.memset(ctypes.c_void_p(a + 4096), 1, (8 << 20) - 4096)\n"
    "    L.munmap(a + 4096, (8 << 20) - 4096)\nelse: print(3)",
    "shared memory of /dev/zero": MAP
    + "f = os.open('/dev/zero', os.O_RDWR)\nprint(3 if L.mmap(0, 8 << 20, 3, 1, f, 0) != -1 else 'refused')",
    "shared memory of /dev/urandom": MAP
    + "f = os.open('/dev/urandom', 0)\nprint(3 if L.mmap(0, 8 << 20, 1, 1, f, 0) != -1 else 'refused')",
    "timers without end": CALL + "t, n = ctypes.c_int(), 0\n"
    "while n < 5000 and L.syscall(222, 0, None, ctypes.byref(t)) == 0: n += 1\nprint(3 if n else 'refused')",
    "signals without end": "import os, signal\nsignal.pthread_sigmask(0, [40]); n = 0\n"
    "for _ in range(5000):\n    try: os.kill(os.getpid(), 40)\n    except OSError: break\n"
    "while signal.sigtimedwait([40], 0): n += 1\nprint(3 if n > 1000 else n)",
    "larger pipes": attack("import fcntl, os", "fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)"),
    "push memory into swap": attack("import mmap", "m = mmap.mmap(-1, 1 << 20); m.madvise(21)"),
    "merge memory with other processes": attack("import mmap", "m = mmap.mmap(-1, 1 << 20); m.madvise(12)"),
    "report broken memory": attack("import mmap", "m = mmap.mmap(-1, 1 << 20); m.madvise(100)"),
    "clocks of other processes": "import os, time\nfor pid in (1, os.getppid(), *range(2, 3000)):\n"
    "    try: time.clock_gettime((~pid << 3) | 2); print(3); break\n    except OSError: pass\nelse: print('none')",
    "sessions of other processes": "import os\nfor pid in {1, *range(2, 3000)} - {os.getpid()}:\n"
    "    try: os.getsid(pid); print(3); break\n    except OSError: pass\nelse: print('none')",
    "schedule of other processes": "import os\nfor pid in {1, *range(2, 3000)} - {os.getpid()}:\n"
    "    try: os.sched_getaffinity(pid); print(3); break\n    except OSError: pass\nelse: print('none')",
    "priority of every process": attack("import os", "os.getpriority(os.PRIO_USER, 1)"),
    "look starved": attack("import os", "os.nice(19)"),
    "look starved, as idle": attack("import os", "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))"),
    "run as root": "import os\nprint(3 if 0 in (*os.getresuid(), *os.getresgid(), *os.getgroups()) else 'no')",
    "open by handle": CALL + "h, m = ctypes.create_string_buffer(136), ctypes.c_int()\nh[0:1] = b'\\x80'\n"
    "if L.syscall(303, -100, b'/', h, ctypes.byref(m), 0) < 0: h[0:8] = b'\\x08\\0\\0\\0\\1\\0\\0\\0'; h[8] = b'\\2'\n"
    "print(3 if L.syscall(304, 0, h, 0) >= 0 else 'refused')",
    "a /proc left open": "import os\nfor fd in range(3, 4096):\n"
    "    try: os.open('self', os.O_PATH, dir_fd=fd); print(3); break\n    except OSError: pass\nelse: print('none')",
}  # fmt: skip

BURN = "import hashlib\ndef f(n): hashlib.pbkdf2_hmac('sha256', b'', b'', n)\n"
#: Must be stopped for their time: they use more of it than one thread would in as many seconds, or hide it.
TIME = {
    "time over many threads": "import threading, time\n" + BURN + "t = [threading.Thread(target=f, args=(3 * 10**5,)) "
    "for _ in range(8)]\n[x.start() for x in t]; [x.join() for x in t]; print(3)",
    "a thread for every moment": "import threading\n" + BURN + "for _ in range(60):\n"
    "    t = threading.Thread(target=f, args=(3 * 10**4,)); t.start(); t.join()\nprint(3)",
    "time in the kernel": "import os\nfor _ in range(400): os.urandom(1 << 22)\nprint(3)",
    "naps": "import time\nfor _ in range(200): time.sleep(.01)\nprint(3)",
}

# ruff: noqa: E501
"""Programs for the sandbox suite: name -> source. Hostile ones print the right answer, 3, only if their attack works.

The task: two integers on stdin, their sum on stdout; or `add(a, b)` returning it, called with 1 and 2.
"""

CALL = "import ctypes, os\nL = ctypes.CDLL(None, use_errno=True)\n"


def attack(*lines: str) -> str:
    """Print 3 if the lines run through."""
    return "\n".join([*lines, "print(3)"])


def call(number: int, *arguments: object) -> str:
    """Print 3 if a raw system call (x86_64) succeeds."""
    return CALL + f"r = L.syscall({', '.join(map(str, (number, *arguments)))})\nprint(3 if r >= 0 else 'refused')"


#: End in a wrong answer or an error, whatever they try.
REFUSED = {
    # forged verdicts
    "exit without output": "import os; os._exit(0)",
    "verdict on stdout": """print('{"correct": true, "reward": 1.0, "status": "ok"}')""",
    "open descriptors": (
        "import os\nfor fd in range(4, 4096):\n    try: os.fstat(fd); print(3); break\n    except OSError: pass"
    ),
    "every descriptor": "import os\nfor fd in range(3, 256):\n    try: os.write(fd, b'3\\n')\n    except OSError: pass",
    "reply frame on stdout": "import os; os.write(1, bytes(41) + b'3')",
    "look for expected output": (
        "import gc\nfound = [o for o in gc.get_objects() if 'output' in repr(type(o)).lower()]\n"
        "import sys\nf = sys._getframe()\nwhile f:\n    for v in list(f.f_locals.values()):\n"
        "        if isinstance(v, dict) and 'output' in v: print(v['output'])\n    f = f.f_back"
    ),
    "patched print and exit": "import builtins, os\nbuiltins.print = lambda *a: None\nos._exit = lambda c: None\nprint(3)",
    "raise in atexit": "import atexit\natexit.register(lambda: 1 / 0)\nprint(4)",
    "exit with the answer": "import sys; sys.exit('3')",
    "exit status 1": "import os; os.write(1, b'3\\n'); os._exit(1)",
    "all statuses": "import os; os._exit(98)",
    "abort": "import os; print(3, flush=True); os.abort()",
    "kill itself": "import os; print(3, flush=True); os.kill(os.getpid(), 9)",
    "segmentation fault": "import ctypes; print(3, flush=True); ctypes.string_at(0)",
    "keyboard interrupt": "print(3, flush=True); raise KeyboardInterrupt",
    "syntax error": "print(3",
    "null byte": "print(3)\0",
    "deep parentheses": "print(" + "(" * 5000 + "3" + ")" * 5000 + ")",
    "exception that lies": "class E(Exception):\n    def __str__(self): raise SystemExit(0)\nprint(3, flush=True)\nraise E",
    "huge exception": "raise RuntimeError('x' * 10**7)",
    "close stdout": "import os; os.close(1); print(3)",
    # output that is nearly right
    "prefix": "print('', end='')",
    "extra line": "print(3); print(3)",
    "extra word": "print('3 3')",
    "unicode digit": "print(chr(0xFF13))",
    "arabic digit": "print(chr(0x663))",
    "superscript": "print(chr(0xB3))",
    "underscore": "print('0_3')",
    "no-break space": "print('3' + chr(0xA0))",
    "zero width space": "print('3' + chr(0x200B))",
    "null after digit": "print('3' + chr(0))",
    "nearly three": "print('3.0000000000000000000000000000000001')",
    "nan": "print(float('nan'))",
    "signalling nan": "print('sNaN')",
    "infinity": "print('inf')",
    "hexadecimal": "print('0x3')",
    "huge exponent": "print('3e999999999999999999999')",
    "many digits": "import sys; sys.set_int_max_str_digits(0); print(10**100000)",
    "invalid utf-8": "import os; os.write(1, b'\\xff3')",
    "utf-16": "import os; os.write(1, '3'.encode('utf-16'))",
    "byte order mark": "import os; os.write(1, b'\\xef\\xbb\\xbf3')",
    "terminal escape": "print('\\x1b[2K3')",
    "pickle on stdout": "import pickle, os, sys; sys.stdout.buffer.write(pickle.dumps({'correct': True}))",
    "empty": "",
    "form feeds between": "print('\\x0c'.join('12'))",
    # processes
    "fork": attack("import os", "if os.fork() == 0: os._exit(0)"),
    "fork bomb": attack("import os", "while True: os.fork()"),
    "raw fork": call(57),
    "raw vfork": call(58),
    "raw clone": call(56, 17, 0, 0, 0, 0),
    "raw clone3": call(435, "ctypes.create_string_buffer(88)", 88),
    "subprocess": attack("import subprocess", "subprocess.run(['true'], check=True)"),
    "system": "import os; print(3 if os.system('true') == 0 else 'no')",
    "popen": "import os; print(os.popen('echo 3').read())",
    "posix_spawn": attack("import os", "os.posix_spawn('/bin/true', ['true'], {})"),
    "exec": attack("import os", "os.execv('/bin/echo', ['echo', '3'])"),
    "exec python": attack("import os, sys", "os.execv(sys.executable, [sys.executable, '-c', 'print(3)'])"),
    "multiprocessing": attack("import multiprocessing as m", "p = m.Process(target=print)", "p.start(); p.join()"),
    "process pool": "from concurrent.futures import ProcessPoolExecutor as P\nprint(P(1).submit(sum, [1, 2]).result())",
    "own session": attack("import os", "os.setsid()"),
    # other processes
    "kill the parent": attack("import os", "os.kill(os.getppid(), 9)"),
    "kill process 1": attack("import os", "os.kill(1, 9)"),
    "kill everything": attack("import os", "os.kill(-1, 9)"),
    "kill the group": attack("import os", "os.killpg(0, 0)"),
    "trace the parent": CALL + "r = L.ptrace(16, os.getppid(), 0, 0)\nprint(3 if r == 0 else 'refused')",
    "let others trace": call(101, 0, 0, 0, 0),
    "read the parent's memory": call(310, "os.getppid()", 0, 0, 0, 0, 0),
    "write the parent's memory": call(311, "os.getppid()", 0, 0, 0, 0, 0),
    "pidfd of the parent": attack("import os", "os.pidfd_open(os.getppid())"),
    "steal a descriptor": call(438, 3, 0, 0),
    "signal by descriptor owner": attack("import fcntl, os", "fcntl.fcntl(0, 8, os.getppid())"),
    "limits of the parent": attack("import os, resource", "resource.prlimit(os.getppid(), 7, (0, 0))"),
    "priority of the parent": attack("import os", "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)"),
    "outlive the parent": call(157, 1, 0, 0, 0, 0),
    "be traceable": call(157, 4, 1, 0, 0, 0),
    # the kernel
    "unshare": call(272, 0x10000000),
    "setns": call(308, 0, 0),
    "mount": call(165, "b'none'", "b'/tmp'", "b'tmpfs'", 0, 0),
    "chroot": attack("import os", "os.chroot('/tmp')"),
    "become root": attack("import os", "os.setuid(0); os.setgid(0); os.setgroups([0]); assert os.getuid() or 1 / 0"),
    "new seccomp filter": call(317, 0, 0, 0),
    "bpf": call(321, 0, 0, 0),
    "perf events": call(298, 0, 0, 0, 0, 0),
    "keyring": call(250, 0, -3, 1),
    "user faults": call(323, 0),
    "io_uring": call(425, 8, "ctypes.create_string_buffer(120)"),
    "memory file": attack("import os", "os.memfd_create('x')"),
    "secret memory": call(447, 0),
    "shared memory of System V": call(29, 0, 4096, 0o1600),
    "message queue of System V": call(68, 0, 0o1600),
    "semaphore of System V": call(64, 0, 1, 0o1600),
    "message queue": call(240, "b'queue'", 0o102, 0o600, 0),
    "x32 calls": call(0x40000000 + 39),
    "personality": call(135, 0x0040000),
    "host name": attack("import socket", "socket.sethostname('x')"),
    "reboot": call(169, 0, 0, 0, 0),
    "clock": attack("import time", "time.clock_settime(time.CLOCK_REALTIME, 0)"),
    "affinity": attack("import os", "os.sched_setaffinity(0, [0])"),
    "real time": attack("import os", "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"),
    "raise limits": attack("import resource as r", "r.setrlimit(r.RLIMIT_AS, (-1, -1))"),
    "raise cpu limit": attack("import resource as r", "r.setrlimit(r.RLIMIT_CPU, (99, 99))"),
    # network
    "tcp": attack("import socket", "socket.create_connection(('1.1.1.1', 80), 1)"),
    "udp": attack("import socket", "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))"),
    "listen": attack("import socket", "socket.create_server(('127.0.0.1', 0))"),
    "ipv6": attack("import socket", "socket.socket(socket.AF_INET6)"),
    "unix": attack("import socket", "socket.socket(socket.AF_UNIX)"),
    "netlink": attack("import socket", "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"),
    "packet": attack("import socket", "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    "urllib": attack("import urllib.request", "urllib.request.urlopen('http://1.1.1.1', timeout=1)"),
    "pair with address": attack(
        "import socket", "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", "a.sendto(b'x', '/dev/log')"
    ),
    "send descriptors": attack("import socket", "a, b = socket.socketpair()", "socket.send_fds(a, [b'x'], [0])"),
    "name service": attack("import socket", "assert socket.getaddrinfo('localhost', 80) is None"),
    # files
    "passwd": attack("open('/etc/passwd').read()"),
    "environment of process 1": attack("open('/proc/1/environ', 'rb').read()"),
    "own memory map": attack("open('/proc/self/maps').read()"),
    "memory of the parent": attack("import os", "open(f'/proc/{os.getppid()}/mem', 'rb')"),
    "list the root": attack("import os", "os.listdir('/')"),
    "list home": attack("import os", "os.listdir('/root')"),
    "open the root": attack("import os", "os.open('/', os.O_RDONLY)"),
    "shared memory folder": attack("open('/dev/shm/pmd_hostile', 'w')"),
    "write to the library": attack("import os", "open(os.path.dirname(os.__file__) + '/pmd_hostile.py', 'w')"),
    "remove from the library": attack("import os", "os.unlink(os.__file__)"),
    "terminal": attack("open('/dev/tty', 'w')"),
    "disk": attack("open('/dev/vda', 'rb')"),
    "kernel memory": attack("open('/dev/mem', 'rb')"),
    "change a mode": attack("import os", "open('x', 'w'); os.chmod('x', 0o4777)"),
    "change an owner": attack("import os", "open('x', 'w'); os.chown('x', 0, 0)"),
    "make a device": attack("import os, stat", "os.mknod('x', stat.S_IFBLK | 0o666, os.makedev(8, 0))"),
    "make a fifo": attack("import os", "os.mkfifo('x')"),
    "link out": attack("import os", "os.symlink('/etc/passwd', 'x'); open('x').read()"),
    "hard link": attack("import os", "os.link(os.__file__, 'x')"),
    "write to stdin": attack("open('/dev/stdin', 'w').write('3 3')"),
    "write to descriptor 0": attack("import os", "os.write(0, b'9')"),
    "extend stdin": attack("import os", "os.ftruncate(0, 1 << 30)"),
    "fill the small disk": attack("f = open('x', 'wb')", "for _ in range(1000): f.write(bytes(1 << 20))", "f.flush()"),
    "many files": attack("for n in range(100000): open(f'f{n}', 'w').close()"),
    "deep folders": "import os\nwhile True:\n    os.mkdir('d' * 250); os.chdir('d' * 250)",
    "closed folders": attack("import os", "os.mkdir('a', 0)", "os.mkdir('b', 0o111)", "open('b/c', 'w')", "1 / 0"),
    "links to folders": attack("import os", "os.symlink('/', 'l')", "os.symlink('.', 'm')", "1 / 0"),
    "strange names": attack(
        "open(b'\\xff\\n', 'w')", "open('moved-1', 'w')", "import os; os.mkdir('moved-2')", "1 / 0"
    ),
    "type into the terminal": attack("import fcntl", "fcntl.ioctl(0, 0x5412, b'x')"),
    "trainer's package": attack("import pmd.types"),
    "import torch": attack("import torch"),
    "shared memory block": attack(
        "from multiprocessing.shared_memory import SharedMemory", "SharedMemory('x', True, 9)"
    ),
    "alarm": "import signal, time\nsignal.alarm(1); time.sleep(5); print(3)",
    "endless recursion": "def f(): f()\nf()",
}
#: Must be stopped for their time.
HANGS = {
    "busy": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "answer, then sleep": "import time; print(3, flush=True); time.sleep(1000)",
    "wait for an event": "import threading; threading.Event().wait()",
    "deadlock": "import threading; l = threading.Lock(); l.acquire(); l.acquire()",
    "thread that stays": (
        "import threading, time\nprint(3, flush=True)\nthreading.Thread(target=time.sleep, args=(1000,)).start()"
    ),
    "regular expression": "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
    "power": "print(len(str(9 ** 9 ** 9)))",
    "ignore signals": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\nwhile True: pass",
    "block signals": "import signal; signal.pthread_sigmask(0, range(1, 65))\nwhile True: pass",
    "stop itself": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "exit handler": "import atexit\ndef f():\n    while True: pass\natexit.register(f); print(3)",
    "exception text": "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    "read a pipe": "import os; r, w = os.pipe(); os.read(r, 1)",
    "close all and sleep": "import os, time; os.closerange(0, 256); time.sleep(1000)",
    "catch everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "pause": "import ctypes; ctypes.CDLL(None).pause()",
    "threads that spin": (
        "import threading\ndef f():\n    while True: pass\nfor _ in range(8): threading.Thread(target=f).start()"
    ),
}
#: Must be stopped for their memory.
GREEDY = {
    "a little too much": "x = bytearray(300 << 20); print(3)",
    "for a moment": "x = b'x' * (300 << 20); del x; print(3)",
    "list": "x = [0] * 10**10",
    "bytes": "bytearray(10**11)",
    "doubling": "s = 'x'\nwhile True: s += s",
    "many objects": "x = []\nwhile True: x.append(bytearray(1 << 16))",
    "decompression": "import zlib\nd = zlib.compress(bytes(1 << 27), 9)\nx = [zlib.decompress(d) for _ in range(99)]",
}
#: Must be stopped, one way or another.
STOPPED = {
    "thread bomb": (
        "import threading, time\nthreading.stack_size(32768)\nn = 0\n"
        "while n < 5000:\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); n += 1\nprint(3)"
    ),
    "out of memory status": "import os; os.write(1, b'3\\n'); os._exit(97)",
    "map": "import mmap; x = mmap.mmap(-1, 1 << 36)",
    "map and touch": "import mmap\nx = []\nwhile True:\n    m = mmap.mmap(-1, 1 << 24); m.write(bytes(1 << 24)); x.append(m)",
    "recursion without limit": "import sys; sys.setrecursionlimit(10**9)\ndef f(): return f() + 1\nf()",
    "recursion in C": "import sys; sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
    "map shared pages": "import mmap\nx = [mmap.mmap(-1, 1 << 30, mmap.MAP_SHARED) for _ in range(99)]",
}
FLOODS = {
    "stdout": "while True: print('x' * 1000)",
    "one write": "print('3' * (100 << 20))",
    "empty lines": "import sys\nwhile True: sys.stdout.write('\\n' * 65536)",
    "stderr": "import sys\nwhile True: sys.stderr.write('x' * 65536)",
    "answer, then flood": "print(3)\nwhile True: print()",
}
#: `add(a, b)` that must not pass.
FUNCTIONS = {
    "equal to everything": "class X:\n    def __eq__(s, o): return True\ndef add(a, b): return X()",
    "integer that lies": "class X(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\ndef add(a, b): return X(9)",
    "text": "def add(a, b): return str(a + b)",
    "nan": "def add(a, b): return float('nan')",
    "infinity": "def add(a, b): return float('inf')",
    "set": "def add(a, b): return {3}",
    "bytes": "def add(a, b): return b'3'",
    "generator": "def add(a, b): yield 3",
    "list": "def add(a, b): return [3]",
    "none": "def add(a, b): pass",
    "print instead": "def add(a, b): print(3)",
    "cycle": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "deep": "def add(a, b):\n    x = 3\n    for _ in range(200000): x = [x]\n    return x",
    "huge integer": "def add(a, b): return 10 ** 10000",
    "patched json": "import json\njson.dumps = lambda *a, **k: 'true'\ndef add(a, b): return 9",
    "result twice": "import os\ndef add(a, b): os.write(3, b'3'); return 3",
    "garbage result": "import os\ndef add(a, b): os.write(3, b'\\xff' * 99); os._exit(0)",
    "deep result": "import os\ndef add(a, b): os.write(3, b'[' * 100000); os._exit(0)",
    "long number result": "import os\ndef add(a, b): os.write(3, b'9' * 100000); os._exit(0)",
    "pickle": "import pickle\nclass X:\n    def __reduce__(s): return print, (3,)\ndef add(a, b): return X()",
    "missing": "def plus(a, b): return a + b",
    "no return": "import os\ndef add(a, b): os._exit(0)",
    "exit": "def add(a, b): exit()",
    "wrong number of arguments": "def add(a): return 3",
    "close the result": "import os\ndef add(a, b): os.close(3); return 3",
    "raise": "def add(a, b): raise ValueError(3)",
}

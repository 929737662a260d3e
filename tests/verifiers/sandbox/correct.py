# ruff: noqa: E501
"""Correct programs that naive sandboxes reject: name -> source."""

#: Read two integers, print the sum.
PROGRAMS = {
    "input": "print(sum(map(int, input().split())))",
    "stdin.buffer": "import sys; print(sum(map(int, sys.stdin.buffer.read().split())))",
    "stdin.readline": "import sys\ninput = sys.stdin.readline\na, b = map(int, input().split()); print(a + b)",
    "iterate stdin": "import sys\nfor line in sys.stdin: print(sum(map(int, line.split())))",
    "open(0)": "print(sum(map(int, open(0).read().split())))",
    "open('/dev/stdin')": "print(sum(map(int, open('/dev/stdin').read().split())))",
    "os.read": "import os; print(sum(map(int, os.read(0, 1 << 20).split())))",
    "until EOFError": "x = []\ntry:\n    while True: x += map(int, input().split())\nexcept EOFError: print(sum(x))",
    "fileinput": "import fileinput\nfor line in fileinput.input(): print(sum(map(int, line.split())))",
    "mmap of stdin": "import mmap\nm = mmap.mmap(0, 0, prot=mmap.PROT_READ); print(sum(map(int, m[:].split())))",
    "exit()": "print(3); exit()",
    "quit()": "print(3); quit()",
    "sys.exit(0)": "import sys; print(3); sys.exit(0)",
    "sys.exit(1)": "import sys; print(3); sys.exit(1)",
    "raise SystemExit": "print(3)\nraise SystemExit",
    "os._exit after flush": "import os; print(3, flush=True); os._exit(0)",
    "main guard": "def main(): print(sum(map(int, input().split())))\nif __name__ == '__main__': main()",
    "divmod": "q, r = divmod(23, 10); print(r)",
    "super()": "class A:\n    def f(self): return 1\nclass B(A):\n    def f(self): return super().f() + 2\nprint(B().f())",
    "except ValueError": "try: int('x')\nexcept ValueError: print(3)",
    "thread": "import threading\nt = threading.Thread(target=lambda: print(3)); t.start(); t.join()",
    "thread not joined": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(.1), print(3))).start()",
    "big stack thread": (
        "import sys, threading\nsys.setrecursionlimit(10**6); threading.stack_size(1 << 27)\n"
        "def f(n): return 3 if n == 0 else f(n - 1)\n"
        "t = threading.Thread(target=lambda: print(f(50000))); t.start(); t.join()"
    ),
    "reserved, not used": "import mmap; x = mmap.mmap(-1, 300 << 20, mmap.MAP_PRIVATE); print(3)",
    "huge stack thread": (
        "import threading; threading.stack_size(1 << 28)\n"
        "t = threading.Thread(target=lambda: print(3)); t.start(); t.join()"
    ),
    "deep recursion": (
        "import sys; sys.setrecursionlimit(10**6)\ndef f(n): return 3 if n == 0 else f(n - 1)\nprint(f(100000))"
    ),
    "deep cached recursion": (
        "import sys\nfrom functools import lru_cache\nsys.setrecursionlimit(10**6)\n"
        "@lru_cache(None)\ndef f(n): return 3 if n == 0 else f(n - 1)\nprint(f(20000))"
    ),
    "thread pool": (
        "from concurrent.futures import ThreadPoolExecutor as P\nwith P(4) as p: print(sum(p.map(int, input().split())))"
    ),
    "asyncio": "import asyncio\nasync def f(): await asyncio.sleep(.01); return 3\nprint(asyncio.run(f()))",
    "numpy": "import numpy as np; print(np.array(input().split(), dtype=int).sum())",
    "standard library": (
        "import array, bisect, cmath, collections, copy, dataclasses, datetime, decimal, enum, fractions, functools\n"
        "import hashlib, heapq, itertools, json, math, operator, queue, random, re, statistics, string, sys, typing\n"
        "import argparse, calendar, csv, difflib, graphlib, ipaddress, secrets, textwrap, timeit, uuid, zlib\nprint(3)"
    ),
    "harness names": "print(reduce(add, map(int, input().split())) if Counter and List[int] and inf > 0 else 0)",
    "write a file": "open('note', 'w').write('3'); print(open('note').read())",
    "temporary file": "import tempfile\nwith tempfile.TemporaryFile('w+') as f: f.write('3'); f.seek(0); print(f.read())",
    "sys.stdout.write": "import sys; sys.stdout.write('3')",
    "stdout.buffer": "import sys; sys.stdout.buffer.write(b'3\\n')",
    "os.write": "import os; os.write(1, b'3')",
    "collected output": (
        "import io, sys\nout = io.StringIO(); old = sys.stdout; sys.stdout = out; print(3); sys.stdout = old\n"
        "print(out.getvalue(), end='')"
    ),
    "print to stderr": "import sys; print('x' * 100000, file=sys.stderr); print(3)",
    "warnings": "import warnings; warnings.warn('careful'); print(3)",
    "blanks at the end": "print('3   \\n\\n')",
    "carriage return": "print('3', end='\\r\\n')",
    "as a float": "print('3.0')",
    "with exponent": "print('+0.3e1')",
    "exec and eval": "exec('x = 1'); print(eval('x + 2'))",
    "match": "match input().split():\n    case [a, b]: print(int(a) + int(b))",
    "global": "x = 0\ndef f():\n    global x\n    x += 3\nf(); print(x)",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 3\nprint(P().x)",
    "own signal handler": "import os, signal\nsignal.signal(10, lambda *a: print(3)); os.kill(os.getpid(), 10)",
    "timer": "import signal, time\nsignal.signal(14, lambda *a: print(3)); signal.setitimer(0, .05); signal.pause()",
    "sleep": "import time; time.sleep(.1); print(3)",
    "lower a limit": "import resource as r; r.setrlimit(r.RLIMIT_STACK, (1 << 24, 1 << 24)); print(3)",
    "own limit": "import resource as r; print(3 if r.getrlimit(r.RLIMIT_AS)[0] > 0 else 0)",
    "200 MB": "x = bytearray(200 << 20); print(3)",
    "long integers": "import sys; sys.set_int_max_str_digits(0); print(len(str(10**20000)) - 19998)",
    "gc and weakref": "import gc, weakref; gc.disable(); gc.collect(); print(3)",
    "context manager": "import contextlib\n@contextlib.contextmanager\ndef f(): yield 3\nwith f() as x: print(x)",
    "pickle": "import pickle; print(pickle.loads(pickle.dumps(3)))",
    "ctypes": "import ctypes; print(ctypes.c_int(3).value)",
    "isatty": "import sys; print(3 if not sys.stdin.isatty() else 0)",
    "cpu count": "import os; print(3 if os.cpu_count() else 0)",
    "time and random": "import random, time; random.seed(1); time.time(); time.perf_counter(); print(3)",
    "unicode": "s = 'ä€😀'; print(len(s))",
    "trailing exception caught": "try:\n    raise KeyError\nfinally:\n    print(3); import sys; sys.exit()",
}
#: Define `add`.
FUNCTIONS = {
    "function": "def add(a, b): return a + b",
    "Solution": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        return a + b",
    "typing without import": "class Solution:\n    def add(self, a: Optional[int], b: int) -> int: return a + b",
    "prints too": "def add(a, b): print('debug', a, b); return a + b",
    "float": "def add(a, b): return float(a + b)",
    "numpy": "import numpy as np\ndef add(a, b): return np.int64(a) + np.int64(b)",
    "lambda": "add = lambda a, b: a + b",
    "static method": "class Solution:\n    @staticmethod\n    def add(a, b): return a + b",
    "main guard": "def add(a, b): return a + b\nif __name__ == '__main__': raise ValueError(input())",
    "boolean arithmetic": "def add(a, b): return sum([True] * (a + b))",
    "integer subclass": "import enum\nclass E(enum.IntEnum):\n    X = 3\ndef add(a, b): return E.X",
}

"""A verifier that never comes back: it runs a program that nothing but SIGKILL ends, and keeps the math helper busy."""

import threading
from dataclasses import replace

from pmd.types import Task, Verdict
from pmd.verifiers.math import MathWorker
from pmd.verifiers.pool import verify

#: What the program calls itself, for the test to find it by.
NAME = "pmd-stubborn"
PROGRAM = f"""
import ctypes, os, signal, threading, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
try: open("left", "w").write("x" * 1000)
except OSError: pass
for _ in range(3): threading.Thread(target=time.sleep, args=(1000,)).start()
ctypes.CDLL(None).prctl(15, b"{NAME}", 0, 0, 0)
while True: time.sleep(1)
"""
CODE = {"kind": "stdin", "cases": [{"input": "", "output": "x"}], "time_limit_s": 600}


class Stubborn:
    """Hangs in turn in a program and in the math helper, on the problems whose answer is `hang`."""

    def __init__(self) -> None:
        self.num_calls, self.lock = 0, threading.Lock()

    def __call__(self, task: Task, completion_text: str) -> Verdict:
        """Verify what does not end."""
        if task.answer != "hang":
            return Verdict(0.0, False, "wrong_answer")
        with self.lock:
            self.num_calls += 1
            even = self.num_calls % 2 == 0
        if even:
            MathWorker(deadline_s=600).ask({"gold": "1", "text": "$9^{9^{9^{9}}}$"})
        return verify(replace(task, verifier="code", tests=CODE), f"```python\n{PROGRAM}\n```")

"""A verifier that never returns: it runs a program that only SIGKILL can end, and keeps the math helper busy."""

import os
import threading
from dataclasses import replace
from pathlib import Path

from pmd.types import Task, Verdict
from pmd.verifiers.math_helpers import MathWorker
from pmd.verifiers.pool import verify

#: Environment variable with the path of a file that is created once the math helper gets its question.
ASKED = "PMD_TEST_ASKED"
#: Process name of the program, by which the test finds it.
NAME = "pmd-hanging"
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


class NeverReturns:
    """Hangs alternately in a program and in the math helper, on tasks whose answer is `hang`."""

    def __init__(self) -> None:
        self.num_calls, self.lock = 0, threading.Lock()

    def __call__(self, task: Task, completion_text: str) -> Verdict:
        """Return a verdict, or never."""
        is_tried = not completion_text or completion_text.startswith("The answer is hang.")  # before the run
        if task.answer != "hang" or is_tried:
            return Verdict(0.0, False, "wrong_answer")
        with self.lock:
            self.num_calls += 1
            even = self.num_calls % 2 == 0
        if even:
            worker = MathWorker(deadline_s=600)
            worker.ask({"gold": "1", "text": "1"})
            Path(os.environ[ASKED]).touch()
            worker.ask({"gold": "1", "text": "\\boxed{\\int_0^1 9^{9^{9^{9}}} dx}"})
        return verify(replace(task, verifier="code", tests=CODE), f"```python\n{PROGRAM}\n```")

"""Verifier for mathematics: compares the last mathematical answer of a completion, using math-verify.

Deviations. A text that is nothing but mathematics is parsed whole, in particular the task's answer: without delimiters
math-verify reads 2\\sqrt{3} as 2. Several boxes form one answer, as in math-verify, unless words such as "no, wait"
stand between the last two; then the last one counts. Small numbers are compared by relative error, because math-verify
considers 10^{-20} and 10^{-21} equal; 1 1/2, 1.5e3 and 0.\\overline{3} are parsed as the numbers they are.

math-verify limits its time with `signal.alarm`, which fails in threads and cannot interrupt C code. It therefore runs,
with its own time-outs off, in one helper process (`math_worker.py`) that is killed at the deadline and restarted. The
helper ends with the trainer: this process holds the write end of a pipe that the helper watches.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time

from pmd.types import Task, Verdict
from pmd.verifiers.exact import tagged_answer

DEADLINE_S = 10.0
START_S = 120.0  # importing sympy on a loaded machine
#: Only this much of the end is parsed, because parsing time grows with length; it fits any final answer.
MAX_CHARACTERS = 20_000


def verify_math(task: Task, completion_text: str) -> Verdict:
    """Compare the last answer of the completion (of its `<answer>` part, if any) with the task's answer."""
    text = tagged_answer(completion_text) if "<answer>" in completion_text else completion_text
    reply = WORKER.ask({"gold": task.answer, "text": text[-MAX_CHARACTERS:]})
    if reply is None:
        return Verdict(
            0.0, False, "timeout", feedback="The final answer took too long to check; write it in a simpler form."
        )
    if reply["answer"] is None:
        return Verdict(0.0, False, "format", feedback="No mathematical answer was found; put it into \\boxed{}.")
    if reply["correct"]:
        return Verdict(1.0, True, "ok", answer=reply["answer"])
    return Verdict(0.0, False, "wrong_answer", feedback="The final answer is not right.", answer=reply["answer"])


class MathWorker:
    """The helper process. Any thread may ask; questions are answered one at a time."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self.deadline_s = deadline_s
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.lifeline: int | None = None  # the write end of the pipe

    def ask(self, question: dict[str, str]) -> dict | None:
        """Return the helper's reply, or None if it missed the deadline.

        Raises:
            RuntimeError: if the helper refused the question, or died before its deadline.
        """
        with self.lock:
            process = self.process if self.process and self.process.poll() is None else self._start()
            started = time.monotonic()
            try:
                assert process.stdin
                process.stdin.write(json.dumps({**question, "deadline_s": self.deadline_s}).encode() + b"\n")
                process.stdin.flush()
                line = self._read_line(process, self.deadline_s + 2)
            except OSError:
                line = b""
            if not line:
                self._stop()
                if time.monotonic() - started >= self.deadline_s - 0.5:
                    return None
                raise RuntimeError("the math-verify helper died")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        self._stop()  # cleans up after a helper that died
        watched, self.lifeline = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pmd.verifiers.math_worker", str(watched)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[watched],
                start_new_session=True,  # Ctrl-C in a terminal must reach the trainer only
            )
        finally:
            os.close(watched)
        if not self._read_line(self.process, START_S):
            self._stop()
            raise RuntimeError("the math-verify helper did not start; is math-verify installed?")
        return self.process

    def _read_line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        assert process.stdout
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        return process.stdout.readline() if poll.poll(seconds * 1000) else b""

    def _stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None
        if self.lifeline is not None:
            os.close(self.lifeline)
            self.lifeline = None

    def close(self) -> None:
        """Kill the helper, even in the middle of a question; the next question starts a new one."""
        while not self.lock.acquire(timeout=0.05):
            if process := self.process:
                process.kill()  # the thread that holds the lock is waiting for a reply
        try:
            self._stop()
        finally:
            self.lock.release()


WORKER = MathWorker()
atexit.register(WORKER.close)

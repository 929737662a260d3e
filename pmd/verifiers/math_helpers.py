"""The helper processes that judge mathematics: one for each thread that asks at the same time, started when needed.

An answer may take forever to compute, in C code that nothing in this process can interrupt. A helper that misses its
deadline is killed, and the next question gets another one, so that nobody waits for a hanging comparison but the thread
that asked. Helpers end with the trainer: each watches a pipe whose write end this process holds.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

#: Seconds of processor time for one question, and how many more the clock on the wall allows if the machine is busy.
DEADLINE_S, BUSY_S = 10.0, 60.0
START_S = 120.0  # importing on a loaded machine
BATCH = 200  # answers of tasks that are checked in one question


class MathWorker:
    """One helper process. Any thread may ask; questions are answered one at a time."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self.deadline_s = deadline_s
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.lifeline: int | None = None  # the write end of the pipe

    def ask(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """Return the helper's reply, or None if the question took longer than the deadline.

        Raises:
            RuntimeError: if the helper refused the question, died, or got no processor time.
        """
        with self.lock:
            process = self.process if self.process and self.process.poll() is None else self._start()
            try:
                assert process.stdin
                process.stdin.write(json.dumps({**question, "deadline_s": self.deadline_s}).encode() + b"\n")
                process.stdin.flush()
                line = self._read_line(process, self.deadline_s + BUSY_S)
            except OSError:
                line = b""
            if not line:
                if process.poll() is None and not self._has_ended(process):
                    self._stop()
                    raise RuntimeError("the math helper got too little processor time; use fewer verifiers.workers")
                self._stop()
                if process.returncode == -signal.SIGPROF:
                    return None
                raise RuntimeError("the math helper died")
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
            raise RuntimeError("the math helper did not start; are mpmath and math-verify installed?")
        return self.process

    def _read_line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        assert process.stdout
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        return process.stdout.readline() if poll.poll(seconds * 1000) else b""

    def _has_ended(self, process: subprocess.Popen[bytes]) -> bool:
        """Return whether the helper's end of the pipe is closed, as happens just before it can be waited for."""
        assert process.stdout
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        return bool(poll.poll(0))

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


class MathHelpers:
    """As many helpers as threads ask at once, so a question never waits for another."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self.deadline_s = deadline_s
        self.lock = threading.Lock()
        self.all: list[MathWorker] = []
        self.idle: list[MathWorker] = []

    def ask(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """Ask an idle helper, or a new one if all are busy; see `MathWorker.ask`."""
        with self.lock:
            if not self.idle:
                self.idle.append(MathWorker(self.deadline_s))
                self.all += self.idle
            worker = self.idle.pop()
        try:
            return worker.ask(question)
        finally:
            with self.lock:
                self.idle.append(worker)

    def describe_gold_problems(self, golds: Sequence[str]) -> list[str | None]:
        """Return for each answer of a task why it cannot be judged, or None."""
        found: list[str | None] = []
        for start in range(0, len(golds), BATCH):
            batch = list(golds[start : start + BATCH])
            reply = self.ask({"golds": batch})
            if reply is not None:
                found += reply["problems"]
            elif len(batch) == 1:
                found.append(f"takes longer than {self.deadline_s:g} s to compute")
            else:  # one of them hangs
                found += [problem for gold in batch for problem in self._describe_alone(gold)]
        return found

    def _describe_alone(self, gold: str) -> list[str | None]:
        return self.describe_gold_problems([gold])

    def close(self) -> None:
        """Kill all helpers; the next question starts a new one."""
        with self.lock:
            helpers = list(self.all)
        for helper in helpers:
            helper.close()


HELPERS = MathHelpers()
atexit.register(HELPERS.close)

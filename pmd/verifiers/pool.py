"""Verify while the engine generates: tasks and completions enter from one thread, futures of verdicts leave.

Back-pressure: `submit` blocks while the backlog is full. Deadlines: a verification that overruns its own is answered
with status `error` and counted; its thread is abandoned and replaced, since Python cannot end it. All threads are
daemons, so neither Ctrl-C nor the end of the trainer waits for one that hangs; programs under test end with the
sandbox, which ends with the process.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from types import TracebackType

from pmd.types import Task, Verdict
from pmd.verifiers import verify

DEADLINE_S = 900.0
#: More than this many abandoned threads mean that verification as a whole is broken.
MOST_ABANDONED = 64


@dataclass(eq=False, slots=True)
class Job:
    """One verification."""

    task: Task
    completion_text: str
    future: "Future[Verdict]" = field(default_factory=Future)
    deadline: float = float("inf")  # set when a thread takes it


class VerificationPool:
    """Threads that verify. Use it as a context manager: leaving it waits for what was submitted, or drops it on error.

    Raises (from `submit`):
        RuntimeError: if the pool was closed, or too many verifications hang.
    """

    def __init__(
        self,
        workers: int | None = None,
        deadline_s: float = DEADLINE_S,
        backlog: int | None = None,
        verifier: Callable[[Task, str], Verdict] = verify,
    ):
        self.num_workers = workers or os.cpu_count() or 1
        self.deadline_s, self.verifier = deadline_s, verifier
        self.num_hung = 0
        self._jobs: queue.Queue[Job | None] = queue.Queue(backlog or 8 * self.num_workers)
        self._running: set[Job] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        for _ in range(self.num_workers):
            self._start(self._work)
        self._start(self._watch)

    def submit(self, task: Task, completion_text: str) -> "Future[Verdict]":
        """Queue one verification; block while the backlog is full."""
        job = Job(task, completion_text)
        while True:
            if self._closed.is_set():
                raise RuntimeError("the verification pool is closed")
            if self.num_hung > MOST_ABANDONED:
                raise RuntimeError(f"{self.num_hung} verifications hung; the last of verifier {task.verifier}")
            with contextlib.suppress(queue.Full):
                self._jobs.put(job, timeout=0.5)
                return job.future

    def close(self, *, drop: bool = False) -> None:
        """Finish what was submitted, or cancel what has not begun; start nothing more."""
        if self._closed.is_set():
            return
        if drop:
            with contextlib.suppress(queue.Empty):
                while True:
                    job = self._jobs.get_nowait()
                    if job:
                        job.future.cancel()
        for _ in range(self.num_workers):
            self._jobs.put(None)
        while not drop and (self._running or not self._jobs.empty()):
            time.sleep(0.005)
        self._closed.set()

    def __enter__(self) -> "VerificationPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(drop=kind is not None)

    def _start(self, what: Callable[[], None]) -> None:
        threading.Thread(target=what, name=f"verify{what.__name__}", daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._lock:
                job.deadline = time.monotonic() + self.deadline_s
                self._running.add(job)
            try:
                verdict = self.verifier(job.task, job.completion_text)
            except BaseException as error:  # a verifier that ends its thread must not end the pool
                verdict = Verdict(0.0, False, "error", feedback="")
                del error
            with self._lock:
                abandoned = job not in self._running
            if abandoned:
                return  # another thread has taken this one's place
            _answer(job, verdict)
            with self._lock:
                self._running.discard(job)

    def _watch(self) -> None:
        """Abandon what overruns its deadline."""
        while not self._closed.wait(min(0.5, self.deadline_s / 4)):
            now = time.monotonic()
            with self._lock:
                late = [job for job in self._running if now > job.deadline]
                self._running.difference_update(late)
                self.num_hung += len(late)
            for job in late:
                self._start(self._work)
                _answer(job, Verdict(0.0, False, "error", seconds=self.deadline_s))


def _answer(job: Job, verdict: Verdict) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled, or answered at its deadline
        job.future.set_result(verdict)

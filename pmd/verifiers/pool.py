"""Runs verifiers: `verify` for one completion, `VerificationPool` in threads while the engine generates.

Verifiers that only look at text are faster than handing work to a thread, so they run inside `submit`. The others run
in threads. `submit` blocks while the backlog is full. A verification that misses its deadline gets status `error` and
is counted; its thread is abandoned and replaced, because Python cannot kill it. All threads are daemons, so neither
Ctrl-C nor the end of the trainer waits for a hanging one; programs under test end with the sandbox, which ends with
the process.
"""

import contextlib
import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from math import isfinite
from numbers import Real
from types import TracebackType
from typing import get_args

from pmd.errors import VerificationError
from pmd.tasks.thinking import MARK, strip_thinking
from pmd.types import Task, Verdict, VerdictStatus
from pmd.verifiers import reward
from pmd.verifiers.combined import Combined
from pmd.verifiers.resolve import find_verifier

#: Run inside `submit`: their time is short and bounded by the length of the completion.
IN_PLACE = frozenset({"boxes", "each_box", "exact", "mcq", "tool_use"})
DEADLINE_S = 900.0
#: More abandoned threads than this at once mean that verification as a whole is broken.
MAX_ABANDONED = 64
ABANDONED = "verification, abandoned"
log = logging.getLogger(__name__)
_crashes: set[tuple[object, ...]] = set()  # that were logged: verifier, kind of error, file, line


def verify(task: Task, completion_text: str) -> Verdict:
    """Return the verdict of the task's verifier and the seconds it took; a crash gives status `error`."""
    started = time.perf_counter()
    try:
        verdict = judge(task, completion_text)
    except (Exception, SystemExit) as error:  # the one place that swallows errors: a verifier must not end a long run
        _report_crash(task, error)
        verdict = Verdict(0.0, False, "error")
    return replace(verdict, seconds=time.perf_counter() - started)


def judge(task: Task, completion_text: str) -> Verdict:
    """Return the verdict of the task's verifier; whatever it raises is raised.

    Verifiers do not see what the model thought before it answered; TRL's functions do, as in TRL. A completion without
    thinking is passed on unchanged.

    Raises:
        TypeError: it returned something else than a verdict.
    """
    verifier = find_verifier(task.verifier)
    if not isinstance(verifier, reward.TRLReward | Combined) and MARK.search(completion_text):
        completion_text = strip_thinking(completion_text)
    return _checked(verifier(task, completion_text))


def _report_crash(task: Task, error: BaseException) -> None:
    """Log a verifier's error with its traceback once; the same error again is only counted, as status `error`."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    place = (task.verifier, type(error).__name__, at.filename, at.lineno)
    if place in _crashes:
        return
    _crashes.add(place)
    is_theirs = at.filename not in (__file__, reward.__file__)
    log.error(  # other ranks than the first are silent below that
        "verifier %s crashed on task %s: %s: %s%s",
        task.verifier, task.task_id, type(error).__name__, error,
        "".join(["\n", *traceback.format_exception(error)]).rstrip() if is_theirs else "",
    )  # fmt: skip


def _checked(result: object) -> Verdict:
    """Return the verdict with plain Python numbers and booleans, or raise TypeError if it is not a valid one."""
    verdict = result if isinstance(result, Verdict) else reward.as_verdict(result)
    if not isinstance(verdict.reward, Real) or not isfinite(verdict.reward):
        raise TypeError(f"its reward {verdict.reward!r} is not a finite number")
    if verdict.status not in get_args(VerdictStatus):
        raise TypeError(f"its status {verdict.status!r} is not one of {', '.join(get_args(VerdictStatus))}")
    if not isinstance(verdict.feedback, str) or not isinstance(verdict.answer, str | None):
        raise TypeError("its feedback or its answer is not a string")
    if not isinstance(verdict.explanation, str):
        raise TypeError("its explanation is not a string")
    for name, text in (
        ("feedback", verdict.feedback),
        ("answer", verdict.answer or ""),
        ("explanation", verdict.explanation),
    ):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TypeError(f"its {name} holds half a character, {text[error.start]!r}") from None
    return replace(verdict, reward=float(verdict.reward), correct=bool(verdict.correct))


@dataclass(frozen=True, slots=True)
class Verified:
    """A finished verification: has `result()` like a future, and is ten times cheaper to create."""

    verdict: Verdict

    def result(self) -> Verdict:
        """Return the verdict."""
        return self.verdict


@dataclass(eq=False, slots=True)
class Job:
    """One verification."""

    task: Task
    completion_text: str
    future: "Future[Verdict]" = field(default_factory=Future)
    deadline: float = float("inf")  # set when a thread starts it
    thread: threading.Thread | None = None  # the thread that runs it


class VerificationPool:
    """Verifies in threads. As a context manager it waits for submitted work on exit, or drops it on an error.

    Raises (from `submit`):
        VerificationError: if too many verifications hang.
        RuntimeError: if the pool was closed.
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
        self._room = threading.Semaphore(backlog or 8 * self.num_workers)
        self._waiting: queue.Queue[Job | None] = queue.Queue()
        self._unanswered: set[Job] = set()
        self._change = threading.Condition()
        self._started, self._closed = False, threading.Event()

    def submit(self, task: Task, completion_text: str) -> "Future[Verdict] | Verified":
        """Verify now or in a thread; blocks while the backlog is full."""
        if task.verifier in IN_PLACE:
            return Verified(self.verifier(task, completion_text))
        job = Job(task, completion_text)
        while True:
            if self._closed.is_set():
                raise RuntimeError("the verification pool is closed")
            num_abandoned = sum(thread.name == ABANDONED for thread in threading.enumerate())
            if num_abandoned > MAX_ABANDONED:
                raise VerificationError(
                    f"{num_abandoned} verifications hang beyond verifiers.deadline_s={self.deadline_s}, the latest "
                    f"for a task with verifier {task.verifier}; fix the verifier, or give it a time limit of its own."
                )
            if self._room.acquire(timeout=0.5):
                break
        with self._change:
            self._unanswered.add(job)
        self._waiting.put(job)
        if not self._started:
            self._started = True
            for loop in (*[self._work] * self.num_workers, self._watch):
                self._start_thread(loop)
        return job.future

    def close(self, *, drop: bool = False) -> None:
        """Wait for submitted work, or with `drop` cancel what has not started; then accept nothing more."""
        if self._closed.is_set():
            return
        with self._change:
            if drop:
                for job in self._unanswered:
                    job.future.cancel()
            else:
                self._change.wait_for(lambda: not self._unanswered)
        self._closed.set()
        for _ in range(self.num_workers):
            self._waiting.put(None)

    def __enter__(self) -> "VerificationPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(drop=kind is not None)

    def _start_thread(self, loop: Callable[[], None]) -> None:
        threading.Thread(target=loop, name="verification", daemon=True).start()

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            self._room.release()
            if not job.future.set_running_or_notify_cancel():
                continue
            with self._change:
                job.thread, job.deadline = threading.current_thread(), time.monotonic() + self.deadline_s
            try:
                verdict = self.verifier(job.task, job.completion_text)
            except BaseException as error:  # a verifier that ends its thread must not end the pool
                verdict = Verdict(0.0, False, "error")
                del error
            if not self._answer(job, verdict):
                return  # abandoned meanwhile; another thread has replaced this one

    def _watch(self) -> None:
        """Abandon verifications that miss their deadline."""
        while not self._closed.wait(min(0.5, self.deadline_s / 4)):
            now = time.monotonic()
            with self._change:
                late = [job for job in self._unanswered if now > job.deadline]
            for job in late:
                if self._answer(job, Verdict(0.0, False, "error", seconds=self.deadline_s)):
                    assert job.thread
                    job.thread.name = ABANDONED
                    self.num_hung += 1
                    self._start_thread(self._work)

    def _answer(self, job: Job, verdict: Verdict) -> bool:
        """Set the verdict unless the job already has one; return whether this verdict was the first."""
        with self._change:
            is_first = job in self._unanswered
            self._unanswered.discard(job)
            if is_first:
                with contextlib.suppress(InvalidStateError):  # cancelled
                    job.future.set_result(verdict)
                self._change.notify_all()
        return is_first

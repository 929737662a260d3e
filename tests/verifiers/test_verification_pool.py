"""The pool of verifying threads: order, back-pressure, deadlines, errors."""

import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from pmd.errors import VerificationError
from pmd.types import Message, Task, Verdict
from pmd.verifiers.pool import MAX_ABANDONED, VerificationPool, Verified

TASK = Task("t", (Message("user", "q"),), "own.verifier", "train", answer="x")


def gate():
    """Return an event and a verifier that waits for it."""
    event = threading.Event()

    def wait(task: Task, text: str) -> Verdict:
        event.wait()
        return Verdict(1.0, True, "ok", answer=text)

    return event, wait


def test_verdicts_belong_to_their_completions():
    def judge(task: Task, text: str) -> Verdict:
        time.sleep(0.001 * (int(text) % 5))
        return Verdict(0.0, int(text) % 3 == 0, "ok", answer=text)

    with VerificationPool(workers=4, verifier=judge) as pool:
        futures = [pool.submit(TASK, str(n)) for n in range(200)]
    assert [future.result().correct for future in futures] == [n % 3 == 0 for n in range(200)]
    assert [future.result().answer for future in futures] == [str(n) for n in range(200)]
    assert pool.num_hung == 0


def test_verifiers_that_only_look_at_text_run_in_place():
    before = set(threading.enumerate())
    with VerificationPool() as pool:
        futures = [pool.submit(replace(TASK, verifier="exact"), text) for text in ("x", "y")]
        assert [isinstance(future, Verified) for future in futures] == [True, True]
        assert [future.result().correct for future in futures] == [True, False]
        assert set(threading.enumerate()) == before
        assert pool.submit(replace(TASK, verifier="no.such"), "x").result().status == "error"
        assert len(set(threading.enumerate()) - before) == pool.num_workers + 1


def test_too_many_hanging_verifications_end_the_run():
    event, wait = gate()

    def submit_all() -> None:
        with VerificationPool(8, deadline_s=0.01, verifier=wait) as pool:
            for _ in range(MAX_ABANDONED + 20):
                pool.submit(TASK, "").result(5)

    try:
        with pytest.raises(VerificationError, match=r"deadline_s=0\.01.*own\.verifier"):
            submit_all()
    finally:
        event.set()


def test_submit_blocks_while_the_backlog_is_full():
    event, wait = gate()
    pool = VerificationPool(workers=1, backlog=2, verifier=wait)
    submitted = []
    thread = threading.Thread(target=lambda: [submitted.append(pool.submit(TASK, str(n))) for n in range(6)])
    thread.start()
    time.sleep(0.2)
    assert len(submitted) == 3  # one in work, two waiting
    event.set()
    thread.join(5)
    pool.close()
    assert [future.result().answer for future in submitted] == [str(n) for n in range(6)]


def test_a_hanging_verification_gets_an_error_and_its_thread_is_replaced():
    event, wait = gate()

    def sometimes(task: Task, text: str) -> Verdict:
        return wait(task, text) if text == "hang" else Verdict(1.0, True, "ok")

    pool = VerificationPool(workers=1, deadline_s=0.2, verifier=sometimes)
    futures = [pool.submit(TASK, text) for text in ("hang", "fine", "hang", "fine")]
    statuses = [future.result(5).status for future in futures]
    assert statuses == ["error", "ok", "error", "ok"]
    assert pool.num_hung == 2
    pool.close()
    event.set()


def test_a_slow_verification_within_its_deadline_keeps_its_verdict():
    def slow(task: Task, text: str) -> Verdict:
        time.sleep(0.6)  # the pool looks for late ones every 0.5 s
        return Verdict(1.0, True, "ok")

    with VerificationPool(workers=1, deadline_s=600, verifier=slow) as pool:
        assert pool.submit(TASK, "").result(60).correct
    assert pool.num_hung == 0


def test_leaving_on_an_error_drops_what_is_waiting():
    event, wait = gate()
    pool = VerificationPool(workers=1, verifier=wait)
    futures = [pool.submit(TASK, "") for _ in range(4)]
    time.sleep(0.05)
    with pytest.raises(KeyboardInterrupt), pool:
        raise KeyboardInterrupt
    assert [future.cancelled() for future in futures] == [False, True, True, True]
    event.set()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(TASK, "")


def test_a_verifier_that_exits_gives_an_error():
    def crash(task: Task, text: str) -> Verdict:
        raise SystemExit(1)

    with VerificationPool(workers=1, verifier=crash) as pool:
        assert [pool.submit(TASK, "").result(5).status for _ in range(3)] == ["error"] * 3


def test_a_hanging_verifier_does_not_keep_the_interpreter_alive():
    code = (
        "import time, threading\nfrom pmd.types import *\nfrom pmd.verifiers.pool import VerificationPool\n"
        "task = Task('t', (Message('user', 'q'),), 'own.verifier', 'train')\n"
        "VerificationPool(1, verifier=lambda t, c: time.sleep(1000)).submit(task, 'x')\ntime.sleep(.1)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=20, check=False).returncode == 0

"""`ThreadSemLock` behaves like the semaphore of `multiprocessing` that it replaces."""

import multiprocessing
import threading

import pytest

from pmd.verifiers.sandbox.semaphores import RECURSIVE, ThreadSemLock

SEMAPHORE = 1
CASES = [(RECURSIVE, 1, 1), (SEMAPHORE, 1, 1), (SEMAPHORE, 0, 5), (SEMAPHORE, 3, 3), (SEMAPHORE, 2, 2**31 - 1)]
STEPS = "aaraarrrraraarrraaaaaarr"


def record(lock, steps):
    """Acquire (a) and release (r) in the order of `steps`; return the result and the state after every step."""
    seen = []
    for step in steps:
        try:
            result = lock.acquire(False) if step == "a" else lock.release()
        except (AssertionError, ValueError) as error:
            result = type(error).__name__
        seen.append((step, result, lock._count(), lock._is_mine(), lock._get_value(), lock._is_zero()))
    return seen


@pytest.mark.parametrize(("kind", "value", "maxvalue"), CASES)
def test_it_behaves_like_a_system_semaphore(kind, value, maxvalue):
    system = multiprocessing.get_context("fork")
    real = (system.RLock() if kind == RECURSIVE else system.Semaphore(value))._semlock  # type: ignore[attr-defined]
    if kind == SEMAPHORE and maxvalue < 2**31 - 1:
        real = type(real)(kind, value, maxvalue, f"/pmd_test_{value}_{maxvalue}_{threading.get_native_id()}", True)
    assert record(ThreadSemLock(kind, value, maxvalue, "/name", True), STEPS) == record(real, STEPS)


def test_threads_wait_for_each_other_and_respect_timeouts():
    lock, seen = ThreadSemLock(SEMAPHORE, 1, 1, "/name", True), []
    with lock:
        assert not lock.acquire(True, 0.01)
        assert not lock.acquire(True, -1.0)
        thread = threading.Thread(target=lambda: seen.append(lock.acquire()))
        thread.start()
        assert seen == []
    thread.join(10)
    assert seen == [True]

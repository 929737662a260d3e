"""`multiprocessing` semaphores for programs that cannot create processes.

`multiprocessing.pool.ThreadPool`, `multiprocessing.dummy` and `multiprocessing.Lock` create a named system semaphore, a
file in /dev/shm, even if only threads share it. `ThreadSemLock` replaces `_multiprocessing.SemLock` without a file.
"""

import threading
from typing import Literal

RECURSIVE = 0


class ThreadSemLock:
    """A counting semaphore, or a lock that the thread holding it may acquire again."""

    SEM_VALUE_MAX = 2**31 - 1

    def __init__(self, kind: int, value: int, maxvalue: int, name: str, unlink: bool):
        self.kind, self.maxvalue, self.handle = kind, maxvalue, id(self)
        self.name = None  # no system object to unlink
        self._semaphore, self._value = threading.Semaphore(value), value
        self._owner, self._held = 0, 0

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Decrement the semaphore; return whether that succeeded."""
        if self.kind == RECURSIVE and self._is_mine():
            self._held += 1
            return True
        if not self._semaphore.acquire(block, max(timeout, 0.0) if block and timeout is not None else None):
            return False
        self._owner = threading.get_ident()
        self._held += 1
        self._value -= 1
        return True

    def release(self) -> None:
        """Increment the semaphore."""
        if self.kind == RECURSIVE:
            if not self._is_mine():
                raise AssertionError("attempt to release recursive lock not owned by thread")
            if self._held > 1:
                self._held -= 1
                return
        elif self._value >= self.maxvalue:
            raise ValueError("semaphore or lock released too many times")
        self._held -= 1
        self._value += 1
        self._semaphore.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> Literal[False]:
        self.release()
        return False

    def _count(self) -> int:
        return self._held

    def _is_mine(self) -> bool:
        return self._held > 0 and self._owner == threading.get_ident()

    def _get_value(self) -> int:
        return self._value

    def _is_zero(self) -> bool:
        return self._value == 0

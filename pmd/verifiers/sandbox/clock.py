"""How much time a program has used, and when it must end.

A program is judged by its CPU time, because on a busy machine the time on the wall says little about it. A program that
does not compute but sleeps or waits must end too, so time in which it neither ran nor waited for a CPU is limited as
well. What is left is a program that was ready to run and was not let: that says nothing about it.
"""

import contextlib
import os
import time
from dataclasses import dataclass

from pmd.verifiers.sandbox.protocol import STARVED, TIMED_OUT

#: A program may take this many times its limit if it sleeps or waits for anything but a CPU, a slow disk for example.
IDLE_FACTOR = 2.0
#: The clock is read again after this share of the time that is left, and no more often than this.
SHARE, SHORTEST_S = 0.25, 0.01
CPUCLOCK_SCHED = 2


@dataclass(frozen=True, slots=True)
class Used:
    """What a program has used since it started, in seconds."""

    cpu_s: float  # of all its threads
    wall_s: float
    waited_s: float  # by the thread that waited most, for a CPU to run on


def end_of(used: Used, limit_s: float, longest_s: float) -> int | None:
    """Return how the program must end now, or None if it may go on."""
    if used.cpu_s >= limit_s or used.wall_s - used.waited_s >= IDLE_FACTOR * limit_s:
        return TIMED_OUT
    return STARVED if used.wall_s >= longest_s else None


def pause_s(used: Used, limit_s: float, longest_s: float) -> float:
    """Return for how long the clock need not be read."""
    idle_s = IDLE_FACTOR * limit_s - (used.wall_s - used.waited_s)
    return max(SHORTEST_S, SHARE * min(limit_s - used.cpu_s, idle_s, longest_s - used.wall_s))


class Clock:
    """The time used by a process.

    Args:
        pid: of the process, in this pid namespace.
        proc: descriptor of a /proc, or None; without one, waiting for a CPU cannot be told from sleeping.
        pid_there: the process's id in that /proc.
    """

    def __init__(self, pid: int, proc: int | None, pid_there: str):
        self._cpu_clock = (~pid << 3) | CPUCLOCK_SCHED  # as clock_getcpuclockid(3) makes it
        self._proc, self._threads = proc, f"{pid_there}/task"
        self.started, self._waited_before = time.monotonic(), self._waited_s()

    def read(self) -> Used:
        """Return what the process has used."""
        return Used(self._cpu_s(), time.monotonic() - self.started, self._waited_s() - self._waited_before)

    def _cpu_s(self) -> float:
        try:
            return time.clock_gettime(self._cpu_clock)
        except OSError:  # it has just ended
            return 0.0

    def _waited_s(self) -> float:
        longest_ns = 0
        if self._proc is not None:
            with contextlib.suppress(
                OSError, ValueError, IndexError
            ):  # it has just ended, or this kernel does not count
                for thread in _names(self._threads, self._proc):
                    longest_ns = max(
                        longest_ns, int(_read(f"{self._threads}/{thread}/schedstat", self._proc).split()[1])
                    )
        return longest_ns / 1e9


def open_proc() -> int | None:
    """Return a descriptor of /proc that stays valid when the root directory changes, or None if there is none."""
    try:
        return os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None


def own_pid(proc: int | None) -> str:
    """Return this process's id as that /proc numbers it; empty if it cannot be told."""
    try:
        return "" if proc is None else os.readlink("self", dir_fd=proc)
    except OSError:
        return ""


def _names(path: str, proc: int) -> list[str]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc)
    try:
        return os.listdir(descriptor)
    finally:
        os.close(descriptor)


def _read(path: str, proc: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    try:
        return os.read(descriptor, 256)
    finally:
        os.close(descriptor)

"""Starts programs that a test interrupts, and finds the processes they leave behind."""

import os
import select
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def start(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a command that SIGINT can end, even if the test itself runs as a shell's background job."""
    return subprocess.Popen(
        command,
        env=os.environ | dict(environment or {}),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=stdout,
        stderr=stderr,
    )


def read_proc(path: str) -> bytes:
    """Return a file of /proc, or nothing if its process has ended."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def command_lines() -> dict[int, bytes]:
    """Return the command line of every process, arguments separated by null bytes."""
    return {int(entry): read_proc(f"/proc/{entry}/cmdline") for entry in os.listdir("/proc") if entry.isdigit()}


def sandbox_processes(trainer_pid: int) -> set[int]:
    """Return the sandbox's processes that belong to a trainer, whose pid is among a supervisor's arguments."""
    found = command_lines().items()
    return {pid for pid, line in found if b"pmd.verifiers.sandbox" in line and f"\0{trainer_pid}\0".encode() in line}


def watch(pids: Iterable[int]) -> list[int]:
    """Return a pidfd of each process that still runs."""
    watched = []
    for pid in pids:
        try:
            watched.append(os.pidfd_open(pid))
        except ProcessLookupError:
            continue
    return watched


def all_end(watched: Iterable[int], within_s: float = 20.0) -> bool:
    """Wait for the watched processes to end, and close their pidfds."""
    ended = True
    for pidfd in watched:
        ended &= bool(select.select([pidfd], [], [], within_s)[0])
        os.close(pidfd)
    return ended

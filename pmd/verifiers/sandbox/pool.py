"""The trainer's side of the sandbox: `Sandbox.run`, from any thread; it blocks while all workers are busy.

A worker is a supervisor with its zygote. A worker that dies, hangs or returns garbage is replaced and its run repeated
once. A program that the machine was too busy to run is repeated once, alone. If that fails too, the outcome is
`sandbox_error`, which says nothing about the program.
"""

import atexit
import contextlib
import math
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pmd.verifiers.sandbox import filesystem, protocol
from pmd.verifiers.sandbox.gate import Gate
from pmd.verifiers.sandbox.protocol import Limits, Reply, Request
from pmd.verifiers.sandbox.streams import Streams

Level = Literal["namespaces", "bubblewrap", "landlock", "rlimits"]
End = Literal["finished", "runtime_error", "timeout", "memory", "output_limit", "sandbox_error"]
START_S = 60.0
#: A worker that has not reported a run this long after the run must have ended counts as hung.
GRACE_S = 10.0
CLOSING_S = 2.0
#: CPU time that a program may use beyond its limit before the clock is read.
CPU_TOLERANCE_S = 0.1
TOO_BUSY = "this machine was too busy to run it"
PROBE = b"""
import ctypes, os, socket
def refused(attempt):
    try: attempt()
    except (OSError, ImportError): return True
print(all(map(refused, [socket.socket, os.fork, lambda: open('/etc/passwd'), lambda: os.kill(os.getppid(), 0),
    lambda: os.listdir('/root' if os.path.isdir('/root') else '/'), lambda: open('/dev/shm/probe', 'w'),
    lambda: os.execv('/bin/true', ['true'])])))
"""


class SandboxUnavailable(RuntimeError):
    """No permitted level works on this machine."""


@dataclass(frozen=True, slots=True)
class Program:
    """Source and input of one run; with an entry, `payload` is the JSON list of its arguments."""

    code: bytes
    payload: bytes = b""
    entry: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended and what it wrote, as bytes: decoding is left to the caller."""

    end: End
    stdout: bytes = b""
    stderr: bytes = b""
    result: bytes = b""  # JSON of what the entry function returned; empty if it did not return
    wall_s: float = 0.0
    cpu_s: float = 0.0


class Worker:
    """One supervisor and its zygote."""

    def __init__(self, level: Level):
        if level == "bubblewrap" and not shutil.which("bwrap"):
            raise SandboxUnavailable("bwrap is not installed")
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                supervisor_command(level),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PATH": os.defpath, "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"},
                cwd="/",
                start_new_session=True,  # Ctrl-C must reach the trainer only, which then closes its workers
            )
        self.peer, self._in_use = ours, threading.Lock()
        try:
            self.missing = self._read_hello()
        except BaseException:
            self.close()
            raise

    def _read_hello(self) -> str:
        self.peer.settimeout(START_S)
        try:
            ready, length = protocol.HELLO.unpack(protocol.receive(self.peer, protocol.HELLO.size))
            text = protocol.receive(self.peer, length).decode()
        except (EOFError, OSError) as error:
            raise SandboxUnavailable(f"its supervisor did not start ({error})") from error
        if not ready:
            raise SandboxUnavailable(text)
        return text

    def run(self, program: Program, limits: Limits, grace_s: float = GRACE_S) -> tuple[Reply, Streams]:
        """Run one program; raises EOFError, OSError or TimeoutError if the worker can no longer be used."""
        with self._in_use, Streams(limits.output_bytes, has_entry=bool(program.entry)) as streams:
            code, payload = protocol.memory_file(program.code), protocol.memory_file(program.payload)
            files = protocol.Files(code, payload, *streams.writers)
            cpu_s = math.ceil(limits.time_s) + 1
            longest_s = limits.longest_s + grace_s
            self.peer.settimeout(longest_s)
            try:
                request = Request(limits.time_s, limits.longest_s, limits.memory_mb, cpu_s, program.entry, files)
                protocol.send_request(self.peer, request)
            finally:
                for descriptor in files:
                    os.close(descriptor)
            if not streams.follow(self.peer, time.monotonic() + longest_s):
                raise TimeoutError("the worker did not answer in time")
            reply = protocol.receive_reply(self.peer)
            streams.drain()
            return reply, streams

    def close(self) -> None:
        """Kill the supervisor, the zygote and everything under them; wait until they have ended."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            self.peer.settimeout(CLOSING_S)
            self.peer.shutdown(socket.SHUT_WR)
            while self.peer.recv(4096):  # the zygote holds the last copy of the other end
                pass
        with self._in_use:  # by now a thread that is running something here has noticed
            self.peer.close()


def supervisor_command(level: Level) -> list[str]:
    """Return the command of a supervisor; at level `bubblewrap` it starts inside bubblewrap's namespaces."""
    packages, root = filesystem.site_packages(), str(Path(__file__).parents[3])
    start = f"import sys; sys.path.insert(0, {root!r}); from pmd.verifiers.sandbox.supervisor import main; main()"
    arguments = ["-S", "-s", "-P", "-B", "-c", start, level, str(os.getpid()), packages]
    if level != "bubblewrap":
        return [sys.executable, *arguments]
    python, readable = os.path.realpath(sys.executable), filesystem.readable_paths(packages)
    writable = ["--size", str(filesystem.TMPFS_BYTES), "--tmpfs", filesystem.writable_place(readable)]
    binds = [part for path in (*readable, python, f"{root}/pmd") for part in ("--ro-bind", path, path)]
    isolation = ["--unshare-all", "--new-session", "--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev"]
    return ["bwrap", *writable, *binds, *isolation, python, *arguments]


class Sandbox:
    """A pool of workers at the strongest level this machine supports, or at the level requested by name."""

    def __init__(self, workers: int | None = None, level: Level | None = None, grace_s: float = GRACE_S):
        self.grace_s = grace_s
        self.num_workers = workers or os.cpu_count() or 1
        self.requested: Level | None = level
        self.level: Level | None = level
        self.reasons: list[str] = []
        self.missing = ""
        self.num_runs = self.num_repeated = self.num_hung = self.num_starved = 0
        self._owner, self._closed = os.getpid(), False
        self._lock = threading.Lock()
        self._gate = Gate()
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        self._all: set[Worker] = set()
        for _ in range(self.num_workers):
            self._idle.put(None)  # placeholder for a worker that is started on first use
        atexit.register(self.close)

    def describe(self) -> str:
        """Return one line that names the level in use and what it lacks; starts a worker to find out."""
        worker = self._take()
        self._idle.put(worker)
        gap = f"; missing: {self.missing}" if self.missing else ""
        why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        return f"sandbox: level {self.level}, {self.num_workers} workers{gap}{why}"

    def run(self, code: str, payload: bytes, limits: Limits, entry: str = "") -> Outcome:
        """Run a program on stdin `payload`, or call its `entry` with the JSON list of arguments in `payload`.

        Raises:
            SandboxUnavailable: if no permitted level works.
        """
        program, reason = Program(code.encode(errors="replace"), payload, entry), ""
        for number in range(2):
            if number and self._closed:
                break
            with self._gate.alone() if number and reason == TOO_BUSY else self._gate.together():
                outcome = self._attempt(program, limits)
            if isinstance(outcome, Outcome):
                return outcome
            reason = outcome
            with self._lock:
                self.num_repeated += 1
                self.num_starved += reason == TOO_BUSY
        return Outcome("sandbox_error", stderr=reason.encode())

    def _attempt(self, program: Program, limits: Limits) -> Outcome | str:
        """Return the outcome, or a text that says why there is none."""
        worker, keep = self._take(), False
        try:
            reply, streams = worker.run(program, limits, self.grace_s)
            keep = reply.end != protocol.NOT_STARTED
            self.num_runs += keep
            if reply.end == protocol.STARVED:
                return TOO_BUSY
            return outcome_of(reply, streams, limits) if keep else streams.texts[1].decode(errors="replace")
        except (EOFError, OSError) as error:
            self.num_hung += isinstance(error, TimeoutError)
            return f"the worker failed: {error!r}"
        finally:  # also on Ctrl-C: the worker's late reply must not go to the next run
            if not keep:
                self._discard(worker)
            self._idle.put(worker if keep else None)

    def _take(self) -> Worker:
        if os.getpid() != self._owner:
            raise RuntimeError("a Sandbox cannot be used across a fork; make one in each process")
        worker = self._idle.get()
        if worker is not None and not self._closed:
            return worker
        try:
            worker = self._start()
        except BaseException:
            self._idle.put(None)
            raise
        self._all.add(worker)
        if self._closed:  # closed while the worker started
            self._discard(worker)
            self._idle.put(None)
            raise SandboxUnavailable("the sandbox was closed")
        return worker

    def _start(self) -> Worker:
        with self._lock:
            if self._closed:
                raise SandboxUnavailable("the sandbox was closed")
            if self.level is not None and (self.level == self.requested == "rlimits" or self._all):
                return self._start_at(self.level)
            levels: list[Level] = [self.requested] if self.requested else ["namespaces", "bubblewrap", "landlock"]
            self.reasons = []
            for level in levels:
                try:
                    worker = self._start_at(level)
                    self._check(worker, level)
                except SandboxUnavailable as error:
                    self.reasons.append(f"{level}: {error}")
                    continue
                self.level = level
                return worker
        tried = "; ".join(self.reasons)
        raise SandboxUnavailable(
            f"no safe level for running programs works here ({tried}); allow user namespaces, or use Linux 5.13 or "
            "later with Landlock, or accept weak protection by requesting level rlimits by name"
        )

    def _start_at(self, level: Level) -> Worker:
        worker = Worker(level)
        self.missing = worker.missing
        return worker

    def _check(self, worker: Worker, level: Level) -> None:
        """Raise SandboxUnavailable if a probe program can do what the level should prevent."""
        if level == "rlimits":
            return
        _, streams = worker.run(Program(PROBE), Limits(time_s=20.0))
        if streams.texts[0].strip() != b"True":
            worker.close()
            output = b"".join(streams.texts)[-200:].decode(errors="replace")
            raise SandboxUnavailable(f"a probe program escaped ({output})")

    def _discard(self, worker: Worker) -> None:
        self._all.discard(worker)
        worker.close()

    def close(self) -> None:
        """Kill every worker; runs in progress end as `sandbox_error`."""
        if os.getpid() != self._owner:
            return
        self._closed = True
        for worker in list(self._all):
            self._discard(worker)
        atexit.unregister(self.close)


def outcome_of(reply: Reply, streams: Streams, limits: Limits) -> Outcome:
    """Derive how a run ended from the kernel and the zygote; a program's exit status can only count against it."""
    code = os.waitstatus_to_exitcode(reply.wait_status)
    memory_full = reply.peak_kb > limits.memory_mb << 10
    end: End = "finished" if code == 0 else "runtime_error"
    if streams.flooded or code == -signal.SIGXFSZ:
        end = "output_limit"
    elif reply.end == protocol.TIMED_OUT or code == -signal.SIGXCPU or reply.cpu_s > limits.time_s + CPU_TOLERANCE_S:
        end = "timeout"
    elif code == protocol.EXIT_MEMORY or memory_full:
        end = "memory"
    stdout, stderr, result = streams.texts
    if code < 0 and end == "runtime_error":
        stderr += f"\nkilled by signal {signal.Signals(-code).name}".encode()
    return Outcome(end, stdout, stderr, result, reply.wall_s, reply.cpu_s)

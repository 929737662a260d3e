"""The zygote: one request after another enters; each forks one confined child, whose bytes and end leave.

Single-threaded, with the usual modules imported once, so that a run costs a fork. It waits for the child's death on a
pidfd, never for the end of a pipe, and kills at the wall limit.
"""

import contextlib
import fcntl
import gc
import os
import select
import signal
import socket
import time
from typing import NamedTuple

from pmd.sandbox import child, protocol, rooms, seccomp
from pmd.sandbox.protocol import Reply, Request

STDERR_KEPT, STDERR_MOST = 16 << 10, 32 << 20
CHUNK = 1 << 16
#: How long a killed child may take to die before the zygote gives itself up.
DYING_S = 5.0
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Confinement(NamedTuple):
    """What every child of this zygote is shut in with."""

    own_root: bool  # in namespaces, with a root directory of its own
    user: int | None  # becomes this user
    ruleset: int | None  # Landlock
    filter: bytes | None  # seccomp
    base_bytes: int  # address space of the interpreter before a program runs


class Pipe:
    """The reading end of one of the child's outputs."""

    def __init__(self, most: int, kept: int | None = None):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.content = bytearray()
        self.most, self.kept = most, kept
        self.num_read, self.ended = 0, False

    def drain(self) -> bool:
        """Read what is there; return whether the child has written more than it may."""
        with contextlib.suppress(BlockingIOError):
            while self.num_read <= self.most:
                part = os.read(self.reader, CHUNK)
                if not part:
                    self.ended = True
                    break
                self.num_read += len(part)
                self.content += part
                if self.kept is not None and len(self.content) > 2 * self.kept:
                    del self.content[: -self.kept]
        return self.num_read > self.most

    def close(self) -> None:
        """Close the reading end."""
        os.close(self.reader)


def serve(peer: socket.socket, confinement: Confinement) -> None:
    """Serve requests until the trainer is gone."""
    offsets = seccomp.pid_offsets(confinement.filter) if confinement.filter else ()
    gc.collect()
    gc.freeze()
    gc.disable()
    while (request := protocol.receive_request(peer)) is not None:
        reply = run(request, confinement, offsets, peer)
        if reply is None:
            return
        protocol.send_reply(peer, reply)
        if reply.end == protocol.NOT_STARTED:
            return  # something is wrong with this zygote; the pool starts another


def run(request: Request, confinement: Confinement, offsets: tuple[int, ...], peer: socket.socket) -> Reply | None:
    """Run one program to its end; None if the trainer went away meanwhile."""
    stdin = _stdin_file(b"" if request.entry else request.payload, confinement.own_root)
    stdout, stderr = Pipe(request.output_bytes), Pipe(STDERR_MOST, STDERR_KEPT)
    result, ready = Pipe(request.output_bytes), Pipe(1)
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        descriptors = (stdin, stdout.writer, stderr.writer, result.writer, ready.writer)
        child.main(request, descriptors, confinement, offsets)
    pipes = (stdout, stderr, result, ready)
    for descriptor in (stdin, *(pipe.writer for pipe in pipes)):
        os.close(descriptor)
    end = _watch(pid, pipes[:3], started + request.wall_s, peer)
    wall_s = time.monotonic() - started
    if end is None:
        return None
    _, status, usage = os.wait4(pid, 0)
    if confinement.own_root:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # everything else in this pid namespace; there should be nothing
        rooms.clear_writable()
    flooded = [pipe.drain() for pipe in pipes]
    if end == protocol.ENDED and any(flooded):
        end = protocol.FLOODED
    if not ready.content:
        end = protocol.NOT_STARTED
    for pipe in pipes:
        pipe.close()
    texts = bytes(stdout.content), bytes(stderr.content[-STDERR_KEPT:]), bytes(result.content)
    return Reply(end, status, wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, *texts)


def _watch(pid: int, pipes: tuple[Pipe, ...], deadline: float, peer: socket.socket) -> int | None:
    """Read the outputs until the child has ended or must; None if the trainer went away or the child cannot die."""
    process = os.pidfd_open(pid)
    by_descriptor = {pipe.reader: pipe for pipe in pipes}
    poll = select.poll()
    for descriptor in (process, peer.fileno(), *by_descriptor):
        poll.register(descriptor, select.POLLIN)
    end = protocol.ENDED
    try:
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0 and end == protocol.ENDED:
                end = protocol.TIMED_OUT
            if end != protocol.ENDED:
                os.kill(pid, signal.SIGKILL)
                return end if _has_ended(process) else None
            ready = [descriptor for descriptor, _ in poll.poll(max(1.0, left_s * 1000))]
            if peer.fileno() in ready:
                os.kill(pid, signal.SIGKILL)
                return None
            if process in ready:
                return end
            for descriptor in ready:
                if by_descriptor[descriptor].drain():
                    end = protocol.FLOODED
                elif by_descriptor[descriptor].ended:
                    poll.unregister(descriptor)
    finally:
        os.close(process)


def _has_ended(process: int) -> bool:
    return bool(select.select([process], [], [], DYING_S)[0])


def _stdin_file(content: bytes, own_root: bool) -> int:
    """Return a descriptor of a read-only file with the input."""
    if own_root:
        with open(rooms.STDIN_FILE, "wb") as file:  # in place: Landlock knows the file, not its name
            file.write(content)
        return os.open(rooms.STDIN_FILE, os.O_RDONLY)
    descriptor = os.memfd_create("stdin", os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    return descriptor

"""The zygote: serves one request at a time by forking a confined child, and reports how the child ended.

It is single-threaded and has imported the common modules once, so a run costs only a fork. It waits for the child on a
pidfd, never for the end of a pipe, and kills it when its time is up, when the trainer asks, or if the trainer is gone.
"""

import contextlib
import gc
import os
import resource
import select
import signal
import socket
import time
from typing import NamedTuple

from pmd.verifiers.sandbox import child, filesystem, protocol, seccomp
from pmd.verifiers.sandbox.child import Confinement
from pmd.verifiers.sandbox.clock import Clock, end_of, pause_s
from pmd.verifiers.sandbox.protocol import Reply, Request

#: If a killed child takes longer than this to die, the zygote exits.
DYING_S = 5.0
#: Time limit for a child to confine itself.
STARTING_S = 5.0


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
            return  # this zygote is broken; the pool starts another


def run(request: Request, confinement: Confinement, offsets: tuple[int, ...], peer: socket.socket) -> Reply | None:
    """Run one program to its end; return None if the trainer is gone."""
    stdin = _stdin_file(request, confinement.stdin_writer)
    ready, ready_writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        child.main(request, stdin, ready_writer, confinement, offsets)
    for descriptor in {stdin, ready_writer, *request.files}:
        os.close(descriptor)
    watched = _watch(pid, ready, request, peer, confinement.proc)
    os.close(ready)
    if watched is None:
        return None
    _, status, usage = os.wait4(pid, 0)
    if confinement.stdin_writer is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # everything else in this pid namespace; there should be nothing left
    if confinement.writable:
        filesystem.clear_writable(confinement.writable)
    peak_kb = max(0, usage.ru_maxrss - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return Reply(watched.end, status, watched.wall_s, usage.ru_utime + usage.ru_stime, peak_kb)


class Watched(NamedTuple):
    """How a child ended, and the time since its program started."""

    end: int
    wall_s: float


def _watch(pid: int, ready: int, request: Request, peer: socket.socket, proc: int | None) -> Watched | None:
    """Wait for the child and kill it if it must end; return None if the trainer is gone or the child does not die.

    Its time starts with the child's byte on `ready`; without that byte the program has not started.
    """
    process, created = os.pidfd_open(pid), time.monotonic()
    clock: Clock | None = None
    left_s, end = STARTING_S, protocol.ENDED
    poll = select.poll()
    for descriptor in (process, peer.fileno(), ready):
        poll.register(descriptor, select.POLLIN)
    try:
        while True:
            events = {descriptor for descriptor, _ in poll.poll(left_s * 1000)}
            if ready in events:
                poll.unregister(ready)
                if written := os.read(ready, 32):
                    clock = Clock(pid, proc, written[1:].decode())
            if events - {ready} or not (events or clock):  # it ended, or must end, or has not started in time
                break
            if clock:
                used = clock.read()
                if (due := end_of(used, request.time_s, request.longest_s)) is not None:
                    end = due
                    break
                left_s = pause_s(used, request.time_s, request.longest_s)
        wall_s = time.monotonic() - (clock.started if clock else created)
        if process not in events:
            os.kill(pid, signal.SIGKILL)
            if events - {ready} and peer.recv(1) != protocol.KILL:
                return None
            if not select.select([process], [], [], DYING_S)[0]:
                return None
        return Watched(end if clock else protocol.NOT_STARTED, wall_s)
    finally:
        os.close(process)


def _stdin_file(request: Request, writer: int | None) -> int:
    """Return a descriptor of the input; at level `namespaces` the input is also the file /dev/stdin."""
    if writer is not None:
        os.ftruncate(writer, 0)  # truncate rather than replace: Landlock rules refer to the file, not to its name
    if request.entry:
        return os.open(os.devnull, os.O_RDONLY)
    if writer is None:
        return request.files.payload
    size = os.fstat(request.files.payload).st_size
    os.lseek(writer, 0, os.SEEK_SET)
    copied = 0
    while copied < size:
        copied += os.sendfile(writer, request.files.payload, copied, size - copied)
    return os.open(filesystem.STDIN_FILE, os.O_RDONLY)

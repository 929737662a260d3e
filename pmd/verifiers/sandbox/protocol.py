"""The protocol between trainer and zygote: numbers, and descriptors of the files and pipes that hold the bytes.

The zygote never holds a program, its input or its output. Those are in sealed memory files and pipes that the trainer
creates and the child uses, so a program that searches its inherited memory finds nothing from earlier runs. Replies
are never unpickled.
"""

import fcntl
import os
import socket
import struct
from typing import NamedTuple

HELLO = struct.Struct("<II")  # 1 ready or 0 failed, length of the text that follows
REQUEST = struct.Struct("<ddIII")  # followed by the entry's name; the descriptors are sent alongside
REPLY = struct.Struct("<Biddi")
KILL = b"K"  # sent by the trainer during a run: the program wrote too much
ENDED, TIMED_OUT, NOT_STARTED, STARVED = range(4)
EXIT_MEMORY = 97  # a child's exit status when memory ran out
NUM_FILES = 5
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


#: A machine that gives a program less of a CPU than one part in BUSY_FACTOR, for BUSY_S and longer, is too busy.
BUSY_FACTOR, BUSY_S = 10.0, 10.0


class Limits(NamedTuple):
    """What one run may use."""

    time_s: float = 6.0  # on a CPU; sleeping and waiting are limited too (see clock.py)
    memory_mb: int = 512
    output_bytes: int = 4 << 20
    busy_s: float | None = None  # see `longest_s`

    @property
    def longest_s(self) -> float:
        """After how many seconds a program ends that has not used its time because it was not given a CPU."""
        return BUSY_FACTOR * self.time_s + BUSY_S if self.busy_s is None else self.busy_s


class Files(NamedTuple):
    """Descriptors of one run: two memory files and the write ends of three pipes."""

    code: int
    payload: int  # stdin, or for an entry the JSON list of its arguments
    stdout: int
    stderr: int
    result: int


class Request(NamedTuple):
    """One run, as sent to the zygote. `entry` is empty for a program that reads stdin."""

    time_s: float
    longest_s: float
    memory_mb: int
    cpu_s: int
    entry: str
    files: Files


class Reply(NamedTuple):
    """How a run ended. `wait_status` is from waitpid, `peak_kb` the memory used beyond the interpreter's own."""

    end: int
    wait_status: int
    wall_s: float
    cpu_s: float
    peak_kb: int


def send_request(peer: socket.socket, request: Request) -> None:
    """Send one request with its descriptors."""
    name = request.entry.encode()
    header = REQUEST.pack(request.time_s, request.longest_s, request.memory_mb, request.cpu_s, len(name))
    socket.send_fds(peer, [header + name], request.files)


def receive_request(peer: socket.socket) -> Request | None:
    """Return the next request, or None when the trainer is gone. Skips a late KILL for the previous run."""
    try:
        first, descriptors = KILL, []
        while first == KILL and not descriptors:
            first, descriptors, _, _ = socket.recv_fds(peer, 1, NUM_FILES)
        if not first:
            return None
        time_s, longest_s, memory_mb, cpu_s, length = REQUEST.unpack(first + receive(peer, REQUEST.size - 1))
        return Request(time_s, longest_s, memory_mb, cpu_s, receive(peer, length).decode(), Files(*descriptors))
    except EOFError:
        return None


def send_reply(peer: socket.socket, reply: Reply) -> None:
    """Send one reply."""
    peer.sendall(REPLY.pack(*reply))


def receive_reply(peer: socket.socket) -> Reply:
    """Return the reply to a request; EOFError if the zygote is gone, TimeoutError if the socket times out."""
    return Reply(*REPLY.unpack(receive(peer, REPLY.size)))


def receive(peer: socket.socket, count: int) -> bytes:
    """Return exactly `count` bytes."""
    parts = bytearray()
    while len(parts) < count:
        part = peer.recv(count - len(parts))
        if not part:
            raise EOFError("the other side is gone")
        parts += part
    return bytes(parts)


def memory_file(content: bytes) -> int:
    """Return the descriptor of a sealed, read-only file in memory, positioned at its start."""
    descriptor = os.memfd_create("pmd", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    return descriptor

"""The bytes between trainer and zygote. Numbers and raw bytes only: nothing that comes back is ever unpickled.

Request: a `Request` header and two byte strings. Reply: a `Reply` header and three. Both sides are ours; what a
program wrote is only ever inside the byte strings.
"""

import socket
import struct
from typing import NamedTuple

HELLO = struct.Struct("<II")  # 1 ready or 0 failed, length of the text that follows
REQUEST = struct.Struct("<IIIdIII")
REPLY = struct.Struct("<BiddIIII")
ENDED, TIMED_OUT, FLOODED, NOT_STARTED = range(4)
EXIT_MEMORY = 97  # how a child says that memory ran out


class Request(NamedTuple):
    """One run. `entry` is empty for a program that reads stdin; otherwise `payload` is the JSON list of arguments."""

    code: bytes
    payload: bytes
    entry: bytes
    wall_s: float
    memory_mb: int
    output_bytes: int
    cpu_s: int


class Reply(NamedTuple):
    """How a run ended. `wait_status` is that of waitpid; `result` what the function returned, as JSON."""

    end: int
    wait_status: int
    wall_s: float
    cpu_s: float
    peak_kb: int
    stdout: bytes
    stderr: bytes
    result: bytes


def send_request(peer: socket.socket, request: Request) -> None:
    """Send one request."""
    texts = request.code, request.payload, request.entry
    header = REQUEST.pack(*map(len, texts), request.wall_s, request.memory_mb, request.output_bytes, request.cpu_s)
    peer.sendall(b"".join((header, *texts)))


def receive_request(peer: socket.socket) -> Request | None:
    """Return the next request, None when the trainer is gone."""
    try:
        num_code, num_payload, num_entry, wall_s, *sizes = REQUEST.unpack(receive(peer, REQUEST.size))
        code, payload, entry = receive(peer, num_code), receive(peer, num_payload), receive(peer, num_entry)
        return Request(code, payload, entry, wall_s, sizes[0], sizes[1], sizes[2])
    except EOFError:
        return None


def send_reply(peer: socket.socket, reply: Reply) -> None:
    """Send one reply."""
    texts = reply[5:]
    peer.sendall(b"".join((REPLY.pack(*reply[:5], *map(len, texts)), *texts)))


def receive_reply(peer: socket.socket) -> Reply:
    """Return the reply to a request.

    Raises:
        EOFError: if the zygote is gone.
        TimeoutError: if the socket has a time-out and it passed.
    """
    end, status, wall_s, cpu_s, peak_kb, *sizes = REPLY.unpack(receive(peer, REPLY.size))
    stdout, stderr, result = (receive(peer, size) for size in sizes)
    return Reply(end, status, wall_s, cpu_s, peak_kb, stdout, stderr, result)


def receive(peer: socket.socket, count: int) -> bytes:
    """Return exactly `count` bytes."""
    parts = bytearray()
    while len(parts) < count:
        part = peer.recv(min(count - len(parts), 1 << 20))
        if not part:
            raise EOFError("the other side is gone")
        parts += part
    return bytes(parts)

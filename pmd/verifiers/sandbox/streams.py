"""The pipes of one run, which the trainer reads up to a byte limit."""

import contextlib
import os
import select
import socket
import time
from types import TracebackType

from pmd.verifiers.sandbox import protocol

#: Bounds for text that is not the program's output, such as stderr.
MESSAGE_BYTES_KEPT, MAX_MESSAGE_BYTES = 16 << 10, 32 << 20
CHUNK = 1 << 16


class Pipe:
    """One pipe, read up to `limit` bytes; keeps all of them, or only the last `kept`."""

    def __init__(self, limit: int, kept: int | None = None):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.content = bytearray()
        self.limit, self.kept = limit, kept
        self.num_read, self.ended = 0, False

    def drain(self) -> None:
        """Read what is available, at most one chunk beyond the limit."""
        with contextlib.suppress(BlockingIOError):
            while self.num_read <= self.limit and not self.ended:
                part = os.read(self.reader, CHUNK)
                self.ended = not part
                self.num_read += len(part)
                self.content += part
                if self.kept is not None and len(self.content) > 2 * self.kept:
                    del self.content[: -self.kept]

    @property
    def flooded(self) -> bool:
        """Whether the program has written more than allowed."""
        return self.num_read > self.limit


class Streams:
    """Stdout, stderr and result of one run; one of them is the output. The caller closes the write ends."""

    def __init__(self, output_bytes: int, *, has_entry: bool = False):
        printed = Pipe(MAX_MESSAGE_BYTES, MESSAGE_BYTES_KEPT) if has_entry else Pipe(output_bytes)
        self.pipes = (printed, Pipe(MAX_MESSAGE_BYTES, MESSAGE_BYTES_KEPT), Pipe(output_bytes))
        self.writers = tuple(pipe.writer for pipe in self.pipes)

    def __enter__(self) -> "Streams":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pipe in self.pipes:
            os.close(pipe.reader)

    @property
    def texts(self) -> tuple[bytes, bytes, bytes]:
        """Stdout (only its end if the result is the output), the end of stderr, and the result."""
        stdout, stderr, result = (bytes(pipe.content) for pipe in self.pipes)
        return stdout, stderr[-MESSAGE_BYTES_KEPT:], result

    @property
    def flooded(self) -> bool:
        """Whether the program wrote more than allowed to any of them."""
        return any(pipe.flooded for pipe in self.pipes)

    def drain(self) -> None:
        """Read what is available."""
        for pipe in self.pipes:
            pipe.drain()

    def follow(self, peer: socket.socket, deadline: float) -> bool:
        """Read until the zygote sends something; have it kill a program that writes too much.

        Never waits for the end of a pipe. Returns False if the deadline passed.
        """
        open_pipes = {pipe.reader: pipe for pipe in self.pipes}
        poll = select.poll()
        for descriptor in (peer.fileno(), *open_pipes):
            poll.register(descriptor, select.POLLIN)
        while (left_s := deadline - time.monotonic()) > 0:
            ready = [descriptor for descriptor, _ in poll.poll(left_s * 1000)]
            if peer.fileno() in ready:
                return True
            for descriptor in ready:
                pipe = open_pipes[descriptor]
                pipe.drain()
                if pipe.flooded:
                    peer.sendall(protocol.KILL)
                if pipe.flooded or pipe.ended:
                    poll.unregister(descriptor)
        return False

"""The pipes of one run, on the trainer's side: what a program writes enters, bounded bytes leave."""

import contextlib
import os
import select
import socket
import time
from types import TracebackType

from pmd.verifiers.sandbox import protocol

#: Of words that are not the program's output.
WORDS_KEPT, WORDS_MOST = 16 << 10, 32 << 20
CHUNK = 1 << 16


class Pipe:
    """One pipe: keeps all of at most `most` bytes, or of any number the last `kept`."""

    def __init__(self, most: int, kept: int | None = None):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.content = bytearray()
        self.most, self.kept = most, kept
        self.num_read, self.ended = 0, False

    def drain(self) -> None:
        """Read what is there, one chunk beyond the limit at most."""
        with contextlib.suppress(BlockingIOError):
            while self.num_read <= self.most and not self.ended:
                part = os.read(self.reader, CHUNK)
                self.ended = not part
                self.num_read += len(part)
                self.content += part
                if self.kept is not None and len(self.content) > 2 * self.kept:
                    del self.content[: -self.kept]

    @property
    def flooded(self) -> bool:
        """Whether the program has written more than it may."""
        return self.num_read > self.most


class Streams:
    """Stdout, stderr and the result of one run, of which one is the output. Whoever closes writing ends owns them."""

    def __init__(self, most: int, *, has_entry: bool = False):
        printed = Pipe(WORDS_MOST, WORDS_KEPT) if has_entry else Pipe(most)
        self.pipes = (printed, Pipe(WORDS_MOST, WORDS_KEPT), Pipe(most))
        self.writers = tuple(pipe.writer for pipe in self.pipes)

    def __enter__(self) -> "Streams":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pipe in self.pipes:
            os.close(pipe.reader)

    @property
    def texts(self) -> tuple[bytes, bytes, bytes]:
        """What was written: stdout (its end, where the result is the output), the end of stderr, the result."""
        stdout, stderr, result = (bytes(pipe.content) for pipe in self.pipes)
        return stdout, stderr[-WORDS_KEPT:], result

    @property
    def flooded(self) -> bool:
        """Whether any of them holds more than it may."""
        return any(pipe.flooded for pipe in self.pipes)

    def drain(self) -> None:
        """Read what is there."""
        for pipe in self.pipes:
            pipe.drain()

    def follow(self, peer: socket.socket, deadline: float) -> bool:
        """Read until the zygote has something to say; have the program killed if it writes too much.

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

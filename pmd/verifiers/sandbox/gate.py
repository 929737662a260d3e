"""Lets runs through together, or one alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Runs of other threads wait while one is alone, and one that wants to be alone waits for those in progress."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._num_inside = self._num_alone = 0  # `_num_alone` counts those that wait to be alone, too

    @contextmanager
    def together(self) -> Iterator[None]:
        """Hold while other runs may be in progress."""
        with self._change:
            self._change.wait_for(lambda: not self._num_alone)
            self._num_inside += 1
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold while no other run is in progress."""
        with self._change:
            self._num_alone += 1
            try:
                self._change.wait_for(lambda: not self._num_inside)
            except BaseException:  # Ctrl-C
                self._num_alone -= 1
                self._change.notify_all()
                raise
            self._num_inside += 1
        try:
            yield
        finally:
            with self._change:
                self._num_alone -= 1
            self._leave()

    def _leave(self) -> None:
        with self._change:
            self._num_inside -= 1
            self._change.notify_all()

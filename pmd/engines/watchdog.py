"""A watchdog for an engine that lives in this process: when no token comes any more, it names what waits and ends it.

Enters: how long nothing may happen, and words for what is pending. Leaves: nothing, or one of two ends. Where steps of
the engine return without anything moving, an EngineError is raised in the thread that generates. Where a step never
returns (a hung kernel, a dead driver) no other thread can end it, and an engine that shares the process of the trainer
cannot be started anew safely: the process ends, and the run goes on from its last checkpoint.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pmd.errors import EngineError

LOOK_EVERY_S = 1.0
EXIT_CODE = 1  # as of any failed run


class StallWatch:
    """Watches the steps of one call of `generate`; used as a context manager around them."""

    def __init__(self, limit_s: float, pending: Callable[[], str]):
        self.limit_s, self.pending = limit_s, pending
        self._stepping_since: float | None = None
        self._moved, self._looked, self._seen = time.monotonic(), 0.0, None
        self._ended = threading.Event()

    def __enter__(self) -> "StallWatch":
        threading.Thread(target=self._watch, name="stall watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step; what the caller does between two steps is not the engine's."""
        self._stepping_since = time.monotonic()
        try:
            yield
        finally:
            self._stepping_since = None

    def look(self, progress: Callable[[], object]) -> None:
        """Note whether `progress` has changed; asked for once a second at most, as it may be costly.

        Raises:
            EngineError: it has been the same for `limit_s`.
        """
        now = time.monotonic()
        if now - self._looked < min(LOOK_EVERY_S, self.limit_s / 4):
            return
        # The caller may have been away since the last look; only what passes while steps are taken counts.
        if now - self._looked > self.limit_s / 2:
            self._moved = now
        self._looked = now
        seen = progress()
        if seen != self._seen:
            self._seen, self._moved = seen, now
        elif now - self._moved > self.limit_s:
            raise EngineError(self._words())

    def _watch(self) -> None:
        while not self._ended.wait(min(LOOK_EVERY_S, self.limit_s / 4)):
            since = self._stepping_since
            if since is not None and time.monotonic() - since > self.limit_s:
                self._end_process()

    def _end_process(self) -> None:
        sys.stdout.flush()
        faulthandler.dump_traceback(sys.stderr)
        print(
            f"EngineError: {self._words()} The step does not return, so this process ends. If an epoch was finished, "
            "continue with --ckpt_path last.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_CODE)

    def _words(self) -> str:
        return (
            f"vLLM gave no token for rollouts.vllm.stall_s={self.limit_s:g} s; {self.pending()}. Nothing of them is "
            "used. An engine in this process cannot be started anew safely: the run stops. Look at the GPU "
            "(nvidia-smi, dmesg); raise stall_s if such a pause is normal there."
        )

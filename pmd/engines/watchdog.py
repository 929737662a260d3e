"""A watchdog for an engine in this process: when it stops producing tokens, the run ends with an error.

If the engine's steps return without progress, an EngineError is raised in the generating thread. If a step never
returns (a hung kernel, a dead driver), no other thread can stop it, and an engine that shares the trainer's process
cannot be restarted safely. The process then exits, and the run can be resumed from its last checkpoint.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pmd.errors import EngineError

CHECK_INTERVAL_S = 1.0
EXIT_CODE = 1  # like any failed run


class StallWatchdog:
    """Watches the engine steps of one call of `generate`; a context manager around them."""

    def __init__(self, limit_s: float, describe_pending: Callable[[], str]):
        self.limit_s, self.describe_pending = limit_s, describe_pending
        self._stepping_since: float | None = None
        self._last_progress, self._last_check, self._state = time.monotonic(), 0.0, None
        self._ended = threading.Event()

    def __enter__(self) -> "StallWatchdog":
        threading.Thread(target=self._watch, name="stall watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one engine step; time that the caller spends between steps does not count."""
        self._stepping_since = time.monotonic()
        try:
            yield
        finally:
            self._stepping_since = None

    def check_progress(self, state: Callable[[], object]) -> None:
        """Compare the engine's state with the one seen last; calls `state` at most once a second.

        Raises:
            EngineError: the state has not changed for `limit_s`.
        """
        now = time.monotonic()
        if now - self._last_check < min(CHECK_INTERVAL_S, self.limit_s / 4):
            return
        # The caller may have been busy elsewhere since the last check; only time during which steps are taken counts.
        if now - self._last_check > self.limit_s / 2:
            self._last_progress = now
        self._last_check = now
        current = state()
        if current != self._state:
            self._state, self._last_progress = current, now
        elif now - self._last_progress > self.limit_s:
            raise EngineError(self._message())

    def _watch(self) -> None:
        while not self._ended.wait(min(CHECK_INTERVAL_S, self.limit_s / 4)):
            since = self._stepping_since
            if since is not None and time.monotonic() - since > self.limit_s:
                self._exit_process()

    def _exit_process(self) -> None:
        sys.stdout.flush()
        faulthandler.dump_traceback(sys.stderr)
        print(
            f"EngineError: {self._message()} The engine step does not return, so this process exits. If an epoch was "
            "finished, resume with --ckpt_path last.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_CODE)

    def _message(self) -> str:
        return (
            f"vLLM produced no token for rollouts.vllm.stall_s={self.limit_s:g} s; {self.describe_pending()}. The "
            "pending completions were discarded. An engine in this process cannot be restarted safely, so the run "
            "stops. Check the GPU (nvidia-smi, dmesg); raise stall_s if such a pause is normal there."
        )

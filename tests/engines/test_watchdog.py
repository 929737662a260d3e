"""The stall watchdog: an engine without progress ends the call; a step that never returns ends the process."""

import itertools
import os
import sys
import time

import pytest

from pmd.engines.watchdog import EXIT_CODE, StallWatchdog
from pmd.errors import EngineError


def pending() -> str:
    return "3 of 8 requests are unfinished"


def test_steps_without_progress_end_the_call():
    def generate() -> None:
        with StallWatchdog(0.1, pending) as watchdog:
            while True:
                with watchdog.step():
                    time.sleep(0.001)
                watchdog.check_progress(lambda: "the same tokens")

    with pytest.raises(EngineError, match=r"no token for rollouts.vllm.stall_s=0.1 s; 3 of 8 requests are unfinished"):
        generate()


def test_slow_progress_and_a_slow_caller_are_no_stall():
    tokens = itertools.count()
    with StallWatchdog(0.2, pending) as watchdog:
        for _ in range(30):
            with watchdog.step():
                time.sleep(0.01)
            watchdog.check_progress(lambda: next(tokens))
        time.sleep(0.3)  # the caller trains
        watchdog.check_progress(lambda: "waiting")
        watchdog.check_progress(lambda: "waiting")


def test_a_step_that_never_returns_ends_the_process(tmp_path):
    said = tmp_path / "said"
    pid = os.fork()
    if pid == 0:
        try:
            sys.stderr = said.open("w")
            with StallWatchdog(0.1, pending) as watchdog, watchdog.step():
                time.sleep(3600)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == EXIT_CODE
    text = said.read_text()
    assert "The engine step does not return, so this process exits." in text
    assert "resume with --ckpt_path last" in text
    assert "time.sleep" in text or "test_watchdog.py" in text  # where it hangs

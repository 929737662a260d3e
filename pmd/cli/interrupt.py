"""Interrupted runs: Ctrl-C and SIGTERM both raise KeyboardInterrupt, and the run prints how to resume it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pmd.errors import EngineError, RunInterrupted, TrainingError
from pmd.run_dir import RunDir


def interrupt_on_sigterm() -> None:
    """Treat SIGTERM like Ctrl-C, so that a terminated job cleans up. Does nothing outside the main thread."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def saying_how_to_resume(run_dir: RunDir) -> Iterator[None]:
    """If the run is interrupted, or its engine or training fails, say how to resume it from its last finished epoch."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Lightning cleans up, then raises SystemExit
        raise RunInterrupted(_how_to_resume(run_dir)) from None
    except (EngineError, TrainingError) as error:
        raise type(error)(f"{error}\n{_how_to_resume(run_dir)}") from error


def _how_to_resume(run_dir: RunDir) -> str:
    if not run_dir.last.is_file():
        return f"stopped in the first epoch, so there is nothing to resume; remove {run_dir.root} and start again."
    return (
        "stopped; everything up to the last finished epoch is saved. Continue with: "
        f"python -m pmd fit --config {run_dir.config} --ckpt_path last"
    )

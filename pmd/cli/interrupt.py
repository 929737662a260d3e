"""What ends a run early, and how it goes on: Ctrl-C and SIGTERM both arrive as KeyboardInterrupt, at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pmd.errors import EngineError, RunInterrupted
from pmd.run_dir import RunDir


def interrupt_on_sigterm() -> None:
    """Treat SIGTERM as Ctrl-C, so that a job that is told to end closes what it holds. Only a main thread can."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def telling_how_to_resume(run_dir: RunDir) -> Iterator[None]:
    """End an interrupted run, and one whose engine failed, with how to go on from its last finished epoch."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Lightning closes what is open, then leaves by SystemExit
        raise RunInterrupted(_how_to_resume(run_dir)) from None
    except EngineError as error:
        raise EngineError(f"{error}\n{_how_to_resume(run_dir)}") from error


def _how_to_resume(run_dir: RunDir) -> str:
    if not run_dir.last.is_file():
        return f"stopped before the end of the first epoch: nothing to resume; remove {run_dir.root} and start again."
    return (
        "stopped; everything up to the last finished epoch is kept. Continue with: "
        f"python -m pmd fit --config {run_dir.config} --ckpt_path last"
    )

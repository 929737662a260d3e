"""How a run ends that does not end by itself: what the user reads is one sentence, and how to go on.

The first Ctrl-C or SIGTERM lets the run clean up; another SIGTERM ends the process at once. Nothing is lost either way,
because every file is replaced whole.
"""

import os
import shlex
import signal
import sqlite3
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from lightning import Callback, LightningModule, Trainer

from pmd.atomic import replace_text
from pmd.errors import ConfigError, DiskError, PmdError, RankLost, RunFailed, RunInterrupted
from pmd.ranks import LOST
from pmd.run_dir import RunDir

_terminated = threading.Event()


def interrupt_on_sigterm() -> None:
    """Treat SIGTERM like Ctrl-C, so that a terminated job cleans up. Does nothing outside the main thread."""
    _terminated.clear()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    if _terminated.is_set():
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"terminated at once\n")
        os._exit(130)
    _terminated.set()
    raise KeyboardInterrupt


class OwnSigterm(Callback):
    """Puts back pmd's handler of SIGTERM, which ends a rank at once: Lightning's first talks to the other ranks, which
    may have gone, or may be in the middle of something else."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act after Lightning has registered its handler."""
        interrupt_on_sigterm()


@contextmanager
def explaining_failures(run_dir: RunDir, *, resumable: bool = True) -> Iterator[None]:
    """Turn whatever ends the run into a PmdError that says what was kept and how to go on.

    Args:
        resumable: whether the command trains; the others change nothing that a run needs.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Lightning cleans up, then raises SystemExit
        raise RunInterrupted(_how_to_resume(run_dir) if resumable else "interrupted") from None
    except Exception as raised:
        error = _of_lost_rank(raised)
        if isinstance(error, PmdError) and not resumable:
            raise error from raised.__cause__
        remedy = _how_to_resume(run_dir) if resumable else "Nothing that the run needs was changed."
        if isinstance(error, ConfigError):
            raise ConfigError([*error.problems, remedy]) from error
        if isinstance(error, PmdError):
            raise type(error)(f"{error}\n{remedy}") from error
        raise type_of(error)(f"{describe(error, run_dir)}\n{remedy}") from error


def _of_lost_rank(error: Exception) -> Exception:
    """Return what says that another rank has gone, if that is behind an error; else the error itself.

    Lightning's own collective operations raise what the backend says.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, RankLost):
            return found
        if isinstance(found, RuntimeError) and any(sign in str(found) for sign in LOST):
            return RankLost(
                f"this rank has lost another one, which has ended or hangs ({' '.join(str(found).split())[:160]})."
            )
        found = found.__cause__ or found.__context__
    return error


def type_of(error: Exception) -> type[PmdError]:
    """Return the kind of error to report for one that is not pmd's own."""
    return DiskError if _is_about_files(error) else RunFailed


def describe(error: Exception, run_dir: RunDir) -> str:
    """Return one sentence about an error; if it was not foreseen, keep its traceback in error.log."""
    if isinstance(error, PmdError):
        return str(error)
    if isinstance(error, OSError) and _is_about_files(error):
        return f"{error.filename or run_dir.root}: {error.strerror}; what was saved before is kept."
    if _is_about_files(error):
        return f"{run_dir.memory}: {error}; what was saved before is kept."
    text = " ".join(str(error).split())
    place = traceback.extract_tb(error.__traceback__)[-1]
    kept = f"at {place.filename}:{place.lineno}"
    with suppress(OSError):
        replace_text(run_dir.error_log, "".join(traceback.format_exception(error)))
        kept = f"traceback in {run_dir.error_log}"
    return f"{type(error).__name__}: {text[:300]} ({kept})"


def _is_about_files(error: Exception) -> bool:
    """Whether the disk, or the permissions of a file, are at fault; errors of the network are OSErrors too."""
    if isinstance(error, OSError):
        return error.errno is not None and not isinstance(error, ConnectionError | TimeoutError | InterruptedError)
    return isinstance(error, sqlite3.Error)


def _how_to_resume(run_dir: RunDir) -> str:
    if not run_dir.last.is_file():
        return f"stopped in the first epoch, so there is nothing to resume; remove {run_dir.root} and start again."
    return (
        "stopped; everything up to the last finished epoch is saved. Continue with: "
        f"python -m pmd fit --config {shlex.quote(str(run_dir.config))} --ckpt_path last"
    )

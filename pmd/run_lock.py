"""A lock on a run directory: while one process works in it, others are refused in words.

The lock is the kernel's (`flock` on RUN/.lock, kept open), so it ends with the process that holds it, however that
process ends. Programs that it starts do not inherit it, and a forked copy closes it. The file itself stays, and means
nothing by itself.
"""

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pmd.errors import ConfigError

LOCK_FILE = ".lock"
#: File systems that have no locks say so with one of these.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: set[int] = set()  # descriptors


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if needed and hold its lock; a folder that was made here and stayed empty is removed again.

    Raises:
        ConfigError: another process holds the lock, or the folder cannot be written.
    """
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder)
    except OSError as error:
        raise ConfigError(f"run_dir={folder} cannot be written ({error.strerror}); give another directory.") from None
    _held.add(descriptor)
    try:
        yield
    finally:
        if not existed:
            with suppress(OSError):
                if os.listdir(folder) == [LOCK_FILE]:
                    (folder / LOCK_FILE).unlink()
                    folder.rmdir()
        _held.discard(descriptor)
        os.close(descriptor)


def describe_holder(folder: Path) -> str:
    """Return a sentence about the process that holds the folder's lock; empty if none does."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _refusal(folder, descriptor)
    except OSError:
        return ""
    finally:
        os.close(descriptor)
    return ""


def _refusal(folder: Path, descriptor: int) -> str:
    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
    return f"run_dir={folder} is in use by {holder}; wait until it has ended, or give another directory."


def _acquire(folder: Path) -> int:
    """Return the open, locked lock file, which now names this process."""
    path = folder / LOCK_FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sentence = _refusal(folder, descriptor)
            os.close(descriptor)
            raise ConfigError(sentence) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                os.close(descriptor)
                raise
            print(f"run_dir={folder} is on a file system without locks; start no other run in it.", file=sys.stderr)
        with suppress(FileNotFoundError):  # a failed run may have removed the file between opening and locking it
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return descriptor
        os.close(descriptor)


def _close_in_child() -> None:
    """Close what a fork has copied: a child that outlives its parent must not go on holding the lock."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)

"""The file format of checkpoints: what torch.save writes, then the SHA-256 of all of it.

torch reads such a file as it is and ignores the last 40 bytes. pmd checks them first, so a truncated file, a flipped
bit and another program's file are found before anything is loaded; and it loads tensors and plain values only, so
opening a checkpoint runs no code.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from pmd import __version__
from pmd.atomic import replacing
from pmd.errors import CheckpointError, DiskError

MAGIC = b"PMDCKPT1"
FOOTER_BYTES = len(MAGIC) + 32
FORMAT = 1
BLOCK_BYTES = 1 << 20
#: What every checkpoint holds, and of which type.
CONTENT = {
    "pmd": dict,
    "state_dict": dict,
    "epoch": int,
    "global_step": int,
    "policy_version": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "RolloutDataModule": dict,
}


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; a full disk, a kill or values that are not finite leave the previous one in place.

    Raises:
        CheckpointError: a tensor that is not a callback's holds NaN or infinity, or a part could not be read again.
        DiskError: the file could not be written.
    """
    kept = f"the last good one, {path}, is kept" if path.is_file() else "there is none to fall back on"
    # The state of callbacks is their own affair: the best score of an EarlyStopping begins at infinity.
    bad = next(_non_finite({key: part for key, part in state.items() if key != "callbacks"}), None)
    if bad is not None:
        raise CheckpointError(
            f"checkpoint={path} was not written, because {bad} holds values that are not finite; {kept}: resume from "
            "it with a lower optimizer.lr."
        )
    writer = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            writer = _HashingWriter(file)
            torch.save(dict(state), cast(BinaryIO, writer))
            file.flush()
            if get_unsafe_globals_in_checkpoint(file.name):
                raise CheckpointError(
                    f"checkpoint={path} was not written, because {next(_unreadable(state), 'it')}, which only running "
                    f"code could read again; {kept}: have callbacks save tensors and plain values only."
                )
            file.write(MAGIC + writer.sha256.digest())
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        cause = writer.error if writer is not None and writer.error is not None else error
        if not isinstance(cause, OSError | RuntimeError):
            raise cause from None  # such as KeyboardInterrupt
        reason = cause.strerror if isinstance(cause, OSError) else f"{cause}".splitlines()[0]
        raise DiskError(f"checkpoint={path} could not be written ({reason}); {kept}: free space and resume.") from error


def read_checkpoint(path: Path, *, mmap: bool = True) -> dict[str, Any]:
    """Return what a checkpoint holds, on the CPU, after checking that the file is whole.

    Args:
        mmap: leave tensors on disk until they are used. Those that ranks have divided are in other files, and only
            placeholders here.

    Raises:
        CheckpointError: the file is damaged, was not written by pmd, or has another format; the message names another.
    """
    try:
        with path.open("rb") as file:
            _check_digest(file, path)
            # The open file, because a run in progress may put the next checkpoint in its place.
            source = f"/proc/self/fd/{file.fileno()}"
            state = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint={path} cannot be read ({error.strerror or error}); {_remedy(path)}"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # the digest is right, so someone has made the file to look like ours
        what = " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"checkpoint={path} holds more than tensors and plain values and was not loaded ({what}); {_remedy(path)}"
        ) from None
    _check_content(state, path)
    if shards := state["pmd"].get("shards"):  # tensors in other files (checkpoint_shards.py)
        shards["path"] = str(path.parent / shards["folder"])
    return state


def is_whole(path: Path) -> bool:
    """Whether a checkpoint exists and its bytes are those that were written."""
    try:
        with path.open("rb") as file:
            _check_digest(file, path, remedy="")
    except (OSError, CheckpointError):
        return False
    return True


def _check_digest(file: BinaryIO, path: Path, remedy: str | None = None) -> None:
    size = os.fstat(file.fileno()).st_size - FOOTER_BYTES
    sha256, left = hashlib.sha256(), max(size, 0)
    while left > 0 and (block := file.read(min(BLOCK_BYTES, left))):
        sha256.update(block)
        left -= len(block)
    footer = file.read(FOOTER_BYTES)
    if size > 0 and footer == MAGIC + sha256.digest():
        return
    if footer.startswith(MAGIC):
        problem = "is damaged: its bytes are not those that were written"
    else:
        problem = "is no whole checkpoint: it is truncated or damaged, or another program wrote it"
    raise CheckpointError(f"checkpoint={path} {problem}; {_remedy(path) if remedy is None else remedy}")


def _check_content(state: Any, path: Path) -> None:
    """Refuse files of another format, and files in which something is missing."""
    found = state if isinstance(state, dict) else {}
    own = found.get("pmd")
    if isinstance(own, dict) and own.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint={path} has format={own.get('format')} and was written by pmd {own.get('version')}; this is "
            f"pmd {__version__}, which reads format {FORMAT}: use the version that wrote it."
        )
    wrong = [key for key, kind in CONTENT.items() if not isinstance(found.get(key), kind)]
    if not wrong and not all(isinstance(value, torch.Tensor) for value in state["state_dict"].values()):
        wrong = ["state_dict"]
    if wrong:
        raise CheckpointError(f"checkpoint={path} is not pmd's: it lacks {', '.join(wrong)}; {_remedy(path)}")


def _remedy(path: Path) -> str:
    """Name the run's other checkpoint if it is whole."""
    name = "last" if path.stem == "best" else "best"
    other = path.with_name(f"{name}.ckpt")
    if other != path and is_whole(other):
        return f"use {other} instead, with --ckpt_path={name}."
    return f"there is no whole {name}.ckpt beside it either: give another checkpoint, or start the run again."


class _HashingWriter:
    """A file for torch.save that computes the digest of what passes through it, and remembers what went wrong."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            self.sha256.update(data)
            return self.file.write(data)
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _unreadable(state: Mapping[str, Any]) -> Iterator[str]:
    """Yield which callbacks' states, and which other parts, hold more than tensors and plain values."""
    callbacks = {f"callbacks.{name}": part for name, part in state["callbacks"].items()}
    for name, part in {**callbacks, **state}.items():
        torch.save(part, buffer := BytesIO())
        buffer.seek(0)
        if unsafe := get_unsafe_globals_in_checkpoint(buffer):
            yield f"{name} holds {', '.join(sorted(unsafe))}"


def _non_finite(value: Any, name: str = "") -> Iterator[str]:
    """Yield the names of the tensors, in nested dicts and lists, that hold NaN or infinity."""
    if isinstance(value, torch.Tensor):
        checked = value.is_floating_point() and value.element_size() > 1 and not value.is_meta
        if checked and not bool(torch.isfinite(value).all()):
            yield name
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _non_finite(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _non_finite(part, f"{name}[{number}]")

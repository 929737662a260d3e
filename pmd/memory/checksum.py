"""A checksum of the store file: SQLite detects damaged pages, but not a flipped bit in a text or a vector.

`NAME.sum`, next to the file, holds its SHA-256 at one generation. Only an update changes the file, and every update
increments the generation, so different bytes at the same generation mean damage. The write-ahead log is merged into the
file first, so the file alone is the whole store and can be copied.

The generation has a check word in the table `meta`, so that a flipped one is not taken for one that is not yet summed.
`NAME.writing` holds the number of the generation that is about to be committed, until its checksum is written: a store
whose update was under way has its write-ahead log beside it, or has lost it.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pmd.errors import MemoryStoreError

_CHECK_WORD = "SELECT 1 FROM meta WHERE key = 'generation_check'"
RETRIES = 20  # while another process writes; an update changes the checksum at most twice
BUSY_MS = 30_000


@dataclass(frozen=True, slots=True)
class Recorded:
    """What lies next to the file."""

    generation: int | None  # of the checksum; None if there is none that can be read
    sha256: str | None  # None where a reader prevented the merge of the log
    writing: int | None  # the generation that is being committed


def write_checksum(db: sqlite3.Connection, path: Path, generation: int) -> None:
    """Merge the log into the file and write the file's checksum, or null if a reader prevents the merge.

    Raises:
        OSError, sqlite3.Error: the disk is full. The store is intact, and `announce` explains the old checksum.
    """
    db.execute("PRAGMA busy_timeout=2000")  # ms; a reader must not delay training
    in_log = bool(db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])  # then the file is not the whole store
    db.execute(f"PRAGMA busy_timeout={BUSY_MS}")
    write_sum(path, generation, None if in_log else _sha256(path))
    _writing_path(path).unlink(missing_ok=True)


def write_sum(path: Path, generation: int, sha256: str | None) -> None:
    """Write the checksum file; None stands for no checksum, so that the file may change at this generation."""
    _replace(checksum_path(path), json.dumps({"generation": generation, "sha256": sha256}))


def announce(path: Path, generation: int) -> None:
    """Record that a generation is about to be committed."""
    _replace(_writing_path(path), str(generation))


def withdraw(path: Path) -> None:
    """Record that it was not."""
    with contextlib.suppress(OSError):
        _writing_path(path).unlink(missing_ok=True)


def settle(db: sqlite3.Connection, path: Path) -> None:
    """Finish or withdraw an update that was interrupted around its commit; only a writer may, before its first update.

    Nothing is changed while another process writes, or where the disk is full.
    """
    if not _writing_path(path).exists():
        return
    try:
        db.execute("PRAGMA busy_timeout=0")
        db.execute("BEGIN IMMEDIATE")
        db.execute("ROLLBACK")
        recorded, generation = read_recorded(path), read_generation(db)
        if recorded.generation is not None and generation == recorded.generation:
            withdraw(path)
        else:
            write_checksum(db, path, generation)
    except (OSError, sqlite3.OperationalError):
        pass
    finally:
        db.execute(f"PRAGMA busy_timeout={BUSY_MS}")


def write_generation(db: sqlite3.Connection, generation: int) -> None:
    """Set the generation and its check word, inside a transaction."""
    rows = {"generation": str(generation), "generation_check": _check_word(generation)}
    db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows.items())


def read_generation(db: sqlite3.Connection) -> int:
    """Return the generation.

    Raises:
        ValueError: it is not a number, or its check word, which stores of earlier versions lack, belongs to another.
    """
    meta = dict(db.execute("SELECT key, value FROM meta WHERE key IN ('generation', 'generation_check')"))
    text = str(meta.get("generation"))
    if not (text.isascii() and text.isdecimal() and len(text) <= 15 and str(int(text)) == text):
        raise ValueError(f"its generation is {text[:40]!r}")
    if meta.get("generation_check", _check_word(int(text))) != _check_word(int(text)):
        raise ValueError(f"its generation={text} does not fit its check word")
    return int(text)


def refuse_lost_log(path: Path) -> None:
    """Refuse a store whose update was under way and whose write-ahead log is gone; a process that dies leaves it.

    Call before connecting, which creates an empty log.
    """
    writing = read_recorded(path).writing
    if writing is None or path.with_name(path.name + "-wal").exists():
        return
    with contextlib.suppress(sqlite3.Error, ValueError):  # damage that is reported later
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)) as db:
            lost = read_generation(db) + 1 == writing
        if lost:
            raise MemoryStoreError(
                f"memory store={path} was being written to generation={writing}, and its write-ahead log was lost; "
                f"{remedy(path)}"
            )


def matches_checksum(db: sqlite3.Connection, path: Path) -> bool:
    """Whether the file matches its checksum; False if there is no checksum of this generation.

    Raises:
        MemoryStoreError: the file is damaged, or is at another generation than its checksum.
    """
    for _ in range(RETRIES):
        recorded = read_recorded(path)
        db.execute("BEGIN")  # no writer changes the file's pages during this transaction
        try:
            generation, has_check_word = read_generation(db), bool(db.execute(_CHECK_WORD).fetchone())
            sha256 = _sha256(path) if recorded.sha256 is not None else None
        except ValueError as error:
            raise MemoryStoreError(f"memory store={path} is damaged ({error}); {remedy(path)}") from error
        finally:
            db.execute("ROLLBACK")
        if read_recorded(path) == recorded:
            break
        time.sleep(0.05)  # another process has just committed
    else:
        return False
    problem = _problem(path, recorded, generation, sha256 == recorded.sha256)
    if not problem and recorded.generation is not None and generation > recorded.generation and not has_check_word:
        problem = f"is at generation={generation}, {checksum_path(path).name} at {recorded.generation}: it is damaged"
    if problem:
        raise MemoryStoreError(f"memory store={path} {problem}; {remedy(path)}")
    return recorded.sha256 is not None and sha256 == recorded.sha256


def _problem(path: Path, recorded: Recorded, generation: int, same_bytes: bool) -> str:
    """Return what is wrong with a store of this generation beside what was recorded; empty if nothing is."""
    summed = recorded.generation if recorded.generation is not None else generation  # unreadable: counts as none
    if generation < summed:
        return f"is at generation={generation} and was at {summed}: its write-ahead log was lost"
    if generation == summed:
        return "" if same_bytes else f"is damaged (its bytes are not those of {checksum_path(path).name})"
    return ""  # newer than its checksum: interrupted before it was summed, or copied here without it


def interrupted(path: Path, generation: int) -> str:
    """Return a sentence if the last update was interrupted and did not reach the store; else empty."""
    writing = read_recorded(path).writing
    if writing is None or writing != generation + 1:
        return ""
    return (
        f"generation {writing} was being written when its process ended: it was not committed, or its write-ahead log "
        "was damaged; resume the run with --ckpt_path=last"
    )


def read_recorded(path: Path) -> Recorded:
    """Read the two files next to the store."""
    generation = sha256 = writing = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(checksum_path(path).read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.keys() == {"generation", "sha256"} and type(found["generation"]) is int:
            generation, sha256 = found["generation"], found["sha256"]
    with contextlib.suppress(OSError, ValueError):
        writing = int(_writing_path(path).read_text(encoding="ascii"))
    return Recorded(generation, sha256, writing)


def remedy(path: Path) -> str:
    """Return advice for a store that cannot be used."""
    return (
        f"move {path.name} and {checksum_path(path).name} away and resume the run with --ckpt_path=last, whose "
        "checkpoint holds the memory; or import an export."
    )


def checksum_path(path: Path) -> Path:
    """Return the path of the checksum file."""
    return path.with_name(path.name + ".sum")


def forget(path: Path) -> None:
    """Remove what is recorded about a file that is about to be replaced or migrated."""
    _writing_path(path).unlink(missing_ok=True)
    checksum_path(path).unlink(missing_ok=True)


def _writing_path(path: Path) -> Path:
    return path.with_name(path.name + ".writing")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _check_word(generation: int) -> str:
    return hashlib.sha256(f"pmd generation {generation}".encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""A checksum of the store file: SQLite detects damaged pages, but not a flipped bit in a text or a vector.

`NAME.sum`, next to the file, holds its SHA-256 at one generation. Only an update changes the file, and every update
increments the generation, so different bytes at the same generation mean damage. The write-ahead log is merged into the
file first, so the file alone is the whole store and can be copied.
"""

import hashlib
import json
import os
import sqlite3
from pathlib import Path

from pmd.errors import MemoryStoreError


def write_checksum(db: sqlite3.Connection, path: Path, generation: int) -> None:
    """Merge the log into the file and write the file's checksum, or null if a reader prevents the merge.

    Raises:
        OSError, sqlite3.Error: the disk is full. The store is intact, and the checksum of the old generation is
        ignored.
    """
    db.execute("PRAGMA busy_timeout=2000")  # ms; a reader must not delay training
    in_log = bool(db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])  # then the file is not the whole store
    db.execute("PRAGMA busy_timeout=30000")
    partial = path.with_name(path.name + ".sum.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"generation": generation, "sha256": None if in_log else _sha256(path)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, checksum_path(path))


def matches_checksum(db: sqlite3.Connection, path: Path) -> bool:
    """Whether the file matches its checksum; False if there is no checksum of this generation.

    Raises:
        MemoryStoreError: the file is damaged, or is at an earlier generation than its checksum.
    """
    try:
        found = json.loads(checksum_path(path).read_text(encoding="utf-8"))
        summed, sha256 = int(found["generation"]), found["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # missing or unreadable; the next update writes a new one
    db.execute("BEGIN")  # no writer changes the file's pages during this transaction
    try:
        rows = db.execute("SELECT value FROM meta WHERE key = 'generation'").fetchall()
        generation = int(rows[0][0]) if rows and str(rows[0][0]).isdecimal() else None
        intact = generation is not None and (generation != summed or sha256 is None or _sha256(path) == sha256)
    finally:
        db.execute("ROLLBACK")
    if generation is not None and generation < summed:
        raise MemoryStoreError(
            f"memory store={path} is at generation={generation} and was at {summed}: its write-ahead log was lost; "
            f"{remedy(path)}"
        )
    if not intact:
        raise MemoryStoreError(
            f"memory store={path} is damaged (its bytes are not those of {checksum_path(path).name}); {remedy(path)}"
        )
    return generation == summed and sha256 is not None


def remedy(path: Path) -> str:
    """Return advice for a store that cannot be used."""
    return (
        f"move {path.name} and {checksum_path(path).name} away and resume the run with --ckpt_path=last, whose "
        "checkpoint holds the memory; or import an export."
    )


def checksum_path(path: Path) -> Path:
    """Return the path of the checksum file."""
    return path.with_name(path.name + ".sum")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

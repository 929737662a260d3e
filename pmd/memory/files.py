"""Opens, creates, checks and replaces the store's file. Damage and mismatches are found before any item is read."""

import contextlib
import hashlib
import json
import os
import sqlite3
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from pmd.atomic import sync_folder
from pmd.errors import MemoryStoreError
from pmd.memory.checksum import (
    forget,
    matches_checksum,
    read_generation,
    remedy,
    write_checksum,
    write_generation,
    write_sum,
)
from pmd.memory.content import check_content, read_embedder_state
from pmd.memory.embed import Embedder, load_embedder
from pmd.memory.migrations import SCHEMA_VERSION, STEPS, migrate

#: SQLite's codes of a file that cannot be opened, read or written: permission, full disk, input or output failed.
_CANNOT = {sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL,
           sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_AUTH}  # fmt: skip
APPLICATION_ID = 0x706D6431  # "pmd1"


def connect(path: Path, read_only: bool) -> sqlite3.Connection:
    """Open the file; a reader writes nothing, and needs no log in a read-only folder."""
    try:
        if read_only:
            log = path.with_name(path.name + "-wal")
            has_log = log.exists() and log.stat().st_size > 0
            # SQLite creates log files even for readers; if it cannot, and there is no log, the file is the whole store.
            mode = "ro" if has_log or os.access(path.parent, os.W_OK) else "ro&immutable=1"
            name = f"file:{quote(str(path))}?mode={mode}"
            db = sqlite3.connect(name, uri=True, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA query_only=ON")
            return db
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        db.execute("PRAGMA foreign_keys=ON")  # reads no page, so `check_file` is what reports damage
        return db
    except (sqlite3.OperationalError, OSError) as error:
        raise unusable(path, error) from error


def create(db: sqlite3.Connection, path: Path, embedder: Embedder) -> None:
    """Create the tables and record the embedder, all or nothing.

    Raises:
        MemoryStoreError: the file cannot be written.
    """
    try:
        _create(db, path, embedder)
        write_checksum(db, path, 0)
    except (sqlite3.OperationalError, OSError) as error:
        raise unusable(path, error) from error


def _create(db: sqlite3.Connection, path: Path, embedder: Embedder) -> None:
    schema = resources.files("pmd.memory").joinpath("schema.sql").read_text(encoding="utf-8")
    meta = {
        "embedder": embedder.name,
        "dimension": str(embedder.dimension),
        "embedder_state": json.dumps(embedder.state(), sort_keys=True),
    }
    forget(path)
    db.execute("PRAGMA journal_mode=WAL")
    db.executescript(
        f"BEGIN IMMEDIATE; PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={SCHEMA_VERSION};\n{schema}"
    )
    db.executemany("INSERT INTO meta VALUES (?, ?)", sorted(meta.items()))
    write_generation(db, 0)
    db.execute("COMMIT")


def is_blank(db: sqlite3.Connection) -> bool:
    """Whether the file is empty: it is new, or its creation was killed before the commit."""
    try:
        return not db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() and (
            db.execute("PRAGMA application_id").fetchone()[0] == 0
        )
    except sqlite3.DatabaseError:
        return False  # damaged; `check_file` reports it


def check_file(db: sqlite3.Connection, path: Path, embedder: Embedder | None, *, load: bool = True) -> Embedder:
    """Refuse damage, other kinds of files, unknown schema versions and other embedders; return the embedder."""
    try:
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        known = application == APPLICATION_ID and (version == SCHEMA_VERSION or version in STEPS)
        intact = known and matches_checksum(db, path)
        damage = ["ok"] if intact else [row[0] for row in db.execute("PRAGMA quick_check(3)")]
        if known and damage == ["ok"]:
            meta = {str(key): str(value) for key, value in db.execute("SELECT key, value FROM meta")}
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _CANNOT:
            raise unusable(path, error) from error
        raise MemoryStoreError(
            f"memory store={path} is damaged or no SQLite file ({one_line(error)}). If the path is right: "
            f"{remedy(path)}"
        ) from error
    if application != APPLICATION_ID:
        raise MemoryStoreError(f"memory store={path} is not a pmd memory store; check the path.")
    if damage != ["ok"]:
        raise MemoryStoreError(f"memory store={path} is damaged ({one_line(damage[0])}); {remedy(path)}")
    if version != SCHEMA_VERSION and version not in STEPS:
        raise MemoryStoreError(
            f"memory store={path} has schema version={version}, this program reads {min(STEPS)} to {SCHEMA_VERSION}; "
            "use the pmd version that wrote it, or start a new store."
        )
    if embedder is None:
        return _recorded_embedder(path, meta) if load else embedder  # type: ignore[return-value]
    found = meta.get("embedder"), meta.get("dimension")
    if found != (embedder.name, str(embedder.dimension)):
        raise MemoryStoreError(
            f"memory.embedder={embedder.name} ({embedder.dimension} dimensions) is not the embedder of store={path}: "
            f"{found[0]} ({found[1]}). Vectors of two embedders must not be mixed; use the same "
            "embedder and training tasks as the run that built the store, or start a new store."
        )
    return embedder


def _recorded_embedder(path: Path, meta: dict[str, str]) -> Embedder:
    """Return the embedder that the store was built with."""
    try:
        state = read_embedder_state(meta["embedder_state"], meta["dimension"])
        embedder = load_embedder(state, (meta["embedder"], int(meta["dimension"])))
        if embedder.name != meta["embedder"]:
            raise ValueError(f"it is {embedder.name}, not {meta['embedder'][:40]}")
    except (KeyError, ValueError) as error:
        raise MemoryStoreError(
            f"memory store={path} is damaged (its embedder cannot be read: {error}); {remedy(path)}"
        ) from error
    return embedder


def bring_up_to_date(db: sqlite3.Connection, path: Path, read_only: bool) -> sqlite3.Connection:
    """Return a connection whose tables have the current schema version.

    A writer migrates the file itself; a reader gets a migrated copy in memory.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version == SCHEMA_VERSION:
        return db
    try:
        if read_only:
            copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            db.backup(copy)
            db.close()
            db = copy
        else:
            forget(path)  # the checksum belongs to the old tables
        migrate(db, version)
        if read_only:
            db.execute("PRAGMA query_only=ON")
    except sqlite3.DatabaseError as error:
        raise MemoryStoreError(
            f"memory store={path} could not be brought from schema version={version} to {SCHEMA_VERSION} "
            f"({one_line(error)}); it is unchanged. Check free disk space and permissions."
        ) from error
    return db


def check_rows(db: sqlite3.Connection, path: Path, embedder: Embedder) -> int:
    """Refuse a store whose tables or values are not those of the schema; return its generation."""
    try:
        generation = read_generation(db)
        check_content(db, embedder, generation)
    except (sqlite3.DatabaseError, ValueError, MemoryStoreError) as error:
        raise MemoryStoreError(
            f"memory store={path} is damaged or foreign ({one_line(error)}); {remedy(path)}"
        ) from error
    return generation


def replace(path: Path, data: bytes) -> None:
    """Replace the file with a snapshot, which is first written to a temporary file and checked.

    Raises:
        MemoryStoreError: the snapshot is damaged, or cannot be written; the file is unchanged.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        generation = _check_snapshot(partial)
        forget(path)
        fold_in_log(path)
        os.replace(partial, path)
        sync_folder(path.parent)
        write_sum(path, generation, hashlib.sha256(data).hexdigest())
    except OSError as error:
        raise unusable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _check_snapshot(path: Path) -> int:
    """Return the snapshot's generation, or refuse it."""
    db = sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)
    try:
        check_file(db, path, None, load=False)
        return read_generation(db)
    finally:
        db.close()


def one_line(error: object) -> str:
    """Return an error's words on one line, not too long: SQLite quotes the statement, which a damaged file can name."""
    words = " ".join(str(error).split())
    return words if len(words) <= 300 else words[:300] + " ..."


def unusable(path: Path, error: OSError | sqlite3.Error) -> MemoryStoreError:
    """Return the error for a store that cannot be opened, created or replaced."""
    reason = error.strerror if isinstance(error, OSError) else one_line(error)
    return MemoryStoreError(
        f"memory store={path} cannot be opened or written ({reason}); check that it is no folder, and permissions and "
        "free disk space."
    )


def fold_in_log(path: Path) -> None:
    """Merge and remove the write-ahead log; SQLite would replay a leftover log into the new file."""
    if path.exists():
        try:
            db = sqlite3.connect(path, timeout=1)
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            db.close()
        except sqlite3.DatabaseError:
            path.unlink()  # damaged, and about to be replaced
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)

"""Opens, creates, checks and replaces the store's file. Damage and mismatches are found before any item is read."""

import json
import os
import sqlite3
from importlib import resources
from pathlib import Path

from pmd.errors import MemoryStoreError
from pmd.memory.checksum import checksum_path, matches_checksum, remedy
from pmd.memory.embed import Embedder, load_embedder
from pmd.memory.migrations import SCHEMA_VERSION, STEPS, migrate

APPLICATION_ID = 0x706D6431  # "pmd1"


def connect(path: Path, read_only: bool) -> sqlite3.Connection:
    """Open the file; a reader writes nothing, and needs no log in a read-only folder."""
    try:
        if read_only:
            log = path.with_name(path.name + "-wal")
            has_log = log.exists() and log.stat().st_size > 0
            # SQLite creates log files even for readers; if it cannot, and there is no log, the file is the whole store.
            mode = "ro" if has_log or os.access(path.parent, os.W_OK) else "ro&immutable=1"
            db = sqlite3.connect(f"file:{path}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA query_only=ON")
            return db
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        db.execute("PRAGMA foreign_keys=ON")  # reads no page, so `check_file` is what reports damage
        return db
    except (sqlite3.OperationalError, OSError) as error:
        raise MemoryStoreError(
            f"memory store={path} cannot be opened ({error}); check path and permissions."
        ) from error


def create(db: sqlite3.Connection, embedder: Embedder) -> None:
    """Create the tables and record the embedder, all or nothing."""
    schema = resources.files("pmd.memory").joinpath("schema.sql").read_text(encoding="utf-8")
    meta = {
        "embedder": embedder.name,
        "dimension": str(embedder.dimension),
        "embedder_state": json.dumps(embedder.state(), sort_keys=True),
        "generation": "0",
    }
    db.execute("PRAGMA journal_mode=WAL")
    db.executescript(
        f"BEGIN IMMEDIATE; PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={SCHEMA_VERSION};\n{schema}"
    )
    db.executemany("INSERT INTO meta VALUES (?, ?)", sorted(meta.items()))
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
        if application == APPLICATION_ID and damage == ["ok"]:
            meta = dict(db.execute("SELECT key, value FROM meta"))
    except sqlite3.DatabaseError as error:
        raise MemoryStoreError(
            f"memory store={path} is damaged or no SQLite file ({error}). If the path is right: {remedy(path)}"
        ) from error
    if application != APPLICATION_ID:
        raise MemoryStoreError(f"memory store={path} is not a pmd memory store; check the path.")
    if damage != ["ok"]:
        raise MemoryStoreError(f"memory store={path} is damaged ({damage[0]}); {remedy(path)}")
    if version != SCHEMA_VERSION and version not in STEPS:
        raise MemoryStoreError(
            f"memory store={path} has schema version={version}, this program reads {min(STEPS)} to {SCHEMA_VERSION}; "
            "use the pmd version that wrote it, or start a new store."
        )
    if embedder is None:
        return load_embedder(json.loads(meta["embedder_state"])) if load else embedder  # type: ignore[return-value]
    if (meta["embedder"], meta["dimension"]) != (embedder.name, str(embedder.dimension)):
        raise MemoryStoreError(
            f"memory.embedder={embedder.name} ({embedder.dimension} dimensions) is not the embedder of store={path}: "
            f"{meta['embedder']} ({meta['dimension']}). Vectors of two embedders must not be mixed; use the same "
            "embedder and training tasks as the run that built the store, or start a new store."
        )
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
            checksum_path(path).unlink(missing_ok=True)  # it belongs to the old tables
        migrate(db, version)
        if read_only:
            db.execute("PRAGMA query_only=ON")
    except sqlite3.DatabaseError as error:
        raise MemoryStoreError(
            f"memory store={path} could not be brought from schema version={version} to {SCHEMA_VERSION} ({error}); "
            "it is unchanged. Check free disk space and permissions."
        ) from error
    return db


def replace(path: Path, data: bytes) -> None:
    """Replace the file with a snapshot, which is first written to a temporary file and checked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        db = sqlite3.connect(f"file:{partial}?mode=ro&immutable=1", uri=True)
        try:
            check_file(db, partial, None, load=False)
        finally:
            db.close()
    except MemoryStoreError:
        partial.unlink()
        raise
    fold_in_log(path)
    checksum_path(path).unlink(missing_ok=True)
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


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

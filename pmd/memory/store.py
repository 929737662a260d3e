"""The memory store: one SQLite file, the single source of truth. One writer, many readers.

Enter: an epoch's verified rollouts and what reflection made of them, through `update()`, which commits all of it and
one new generation number, or nothing. Leave: records, vectors, and the whole store as bytes for a checkpoint.
Write-ahead logging with synchronous=NORMAL: a killed process loses nothing that was committed.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pmd.config.schema import MemoryConfig
from pmd.errors import MemoryStoreError
from pmd.memory import files, records
from pmd.memory.checksum import seal
from pmd.memory.embed import Embedder
from pmd.memory.write import RetrievalLog, Writer
from pmd.memory.write_behaviours import match_behaviours
from pmd.types import MemoryItem


class MemoryStore:
    """The procedural memory of one run."""

    def __init__(self, db: sqlite3.Connection, path: Path, embedder: Embedder, config: MemoryConfig):
        self._db = db
        self.path = path
        self.embedder = embedder
        self.config = config
        self.generation = int(self.meta("generation"))
        self.read_only = bool(self.query("PRAGMA query_only")[0][0])
        self._retrievals: list[RetrievalLog] = []
        self._writer: Writer | None = None  # while an update is under way

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        embedder: Embedder | None = None,
        config: MemoryConfig | None = None,
        read_only: bool = False,
    ) -> "MemoryStore":
        """Open a store, or create it where there is none.

        Args:
            embedder: must be the one the store was built with; None takes the store's own.
            config: the caps that writing obeys.

        Raises:
            MemoryStoreError: the file is damaged, no store, of another schema version, or of another embedder.
        """
        path = Path(path)
        exists = path.exists() and path.stat().st_size > 0
        if not exists and (read_only or embedder is None):
            raise MemoryStoreError(f"memory store={path} does not exist; check the path.")
        db = files.connect(path, read_only)
        try:
            if embedder is not None and not read_only and files.is_blank(db):
                files.create(db, embedder)
            found = files.check_file(db, path, embedder)
            db = files.brought_up_to_date(db, path, read_only)
            db.execute("PRAGMA synchronous=NORMAL")
        except BaseException:
            db.close()
            raise
        return cls(db, path, found, config or MemoryConfig())

    def close(self) -> None:
        """Close the file; the write-ahead log is folded in."""
        self._db.close()

    def __enter__(self) -> "MemoryStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    @contextmanager
    def update(self) -> Iterator[Writer]:
        """Open one transaction: everything written inside, and generation + 1, is committed whole or not at all."""
        if self._db.in_transaction:
            raise MemoryStoreError("update() inside update(): finish the first before opening another.")
        try:
            self._db.execute("BEGIN IMMEDIATE")
            if int(self.meta("generation")) != self.generation:
                raise MemoryStoreError(
                    f"memory store={self.path} is at generation={self.meta('generation')}, this process read "
                    f"{self.generation}: another process wrote to it. Give each run a store of its own."
                )
            self._writer = Writer(self._db, self.generation + 1, self.embedder, self.config)
            yield self._writer
            self._writer.finish(self._retrievals)
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError | sqlite3.DatabaseError):
                raise MemoryStoreError(
                    f"memory store={self.path} could not be written ({error}); nothing of this update was kept. "
                    "Check free disk space and permissions, and that no other process writes to it."
                ) from error
            raise
        finally:
            self._writer = None
        self.generation += 1
        self._retrievals.clear()
        try:
            seal(self._db, self.path, self.generation)
        except (OSError, sqlite3.Error) as error:
            raise MemoryStoreError(
                f"memory store={self.path} is written, but its checksum could not be ({error}). Check free disk space."
            ) from error

    def log_retrievals(
        self, step: int, group_id: str, procedures: Sequence[MemoryItem], dropped: Sequence[MemoryItem] = ()
    ) -> None:
        """Remember what the teacher was shown, and what its prompt had no room for; written with the next update."""
        chosen = [(procedure, True) for procedure in procedures] + [(procedure, False) for procedure in dropped]
        self._retrievals += [
            RetrievalLog(self.generation, step, group_id, rank, procedure, included)
            for rank, (procedure, included) in enumerate(chosen)
        ]

    def snapshot(self) -> bytes:
        """Return the committed store as bytes, for a checkpoint."""
        with sqlite3.connect(":memory:") as copy:
            self._db.backup(copy)
            copy.execute("PRAGMA journal_mode=MEMORY")
            data = copy.serialize()
        copy.close()
        return data

    @classmethod
    def restore(cls, path: str | Path, data: bytes) -> None:
        """Put a snapshot in place of the file, which no one may hold open. Killed midway, old or new file is whole.

        Raises:
            MemoryStoreError: the bytes are no sound store; the file is left as it was.
        """
        files.replace(Path(path), data)

    def meta(self, key: str) -> str:
        """Return one value of the store's own description."""
        return self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0]

    def problems(self) -> list[records.Problem]:
        """Return all problems in id order."""
        return records.read_problems(self._db)

    def experiences(self, status: str | None = "live") -> list[records.Experience]:
        """Return the experiences of one status (`live`: active or absorbed; None: all) in id order."""
        return records.read_experiences(self._db, status)

    def insights(self, status: str | None = "live") -> list[records.Insight]:
        """Return the insights of one status (`live`: active or absorbed; None: all) in id order."""
        return records.read_insights(self._db, status)

    def behaviours(self, status: str | None = "live") -> list[records.Behaviour]:
        """Return the behaviours of one status (`live`: active or absorbed; None: all) in id order."""
        return records.read_behaviours(self._db, status)

    def vectors(self, table: str) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [n] and vectors [n, D] of `problems`, or of the live `insights` or `behaviours`.

        Insights have stored vectors only under a costly embedder. Inside an update, what is new is embedded first.
        """
        if self._writer is not None:
            self._writer.embed_new()
        return records.read_vectors(self._db, table, self.embedder.dimension)

    def match_behaviours(self, clusters: Sequence[tuple[str, Sequence[int]]]) -> dict[int, records.Behaviour]:
        """Return which active behaviours clusters (polarity, insight ids) continue, by position."""
        active = {behaviour.id: behaviour for behaviour in self.behaviours()}
        matches = match_behaviours(self._db, clusters, list(active.values()))
        return {position: active[behaviour_id] for position, behaviour_id in matches.items()}

    def query(self, sql: str, *values: Any) -> list[tuple]:
        """Run one reading statement."""
        return self._db.execute(sql, values).fetchall()

    def query_rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """Run one reading statement; rows by column name."""
        cursor = self._db.execute(sql, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def stats(self) -> dict[str, float]:
        """Count what the store holds, for logs and tables."""
        counts: dict[str, float] = {"generation": self.generation, "problems": self._count("problems")}
        for table in ("experiences", "insights", "behaviours"):
            counts[table] = self._count(f"{table} WHERE status = 'active'")
        for kind in ("strategy", "lesson", "contrast"):
            counts[f"kind_{kind}"] = self._count(f"insights WHERE status = 'active' AND kind = '{kind}'")
        for status in ("shadow", "absorbed", "retired", "quarantined"):
            counts[f"insights_{status}"] = self._count(f"insights WHERE status = '{status}'")
        counts["distinct_insights"] = self.query(
            "SELECT count(*) FROM (SELECT DISTINCT kind, content FROM insights WHERE status = 'active')"
        )[0][0]
        covered = self.query("SELECT count(DISTINCT problem_id) FROM insights WHERE status = 'active'")[0][0]
        counts["coverage"] = covered / max(1, counts["problems"])  # share of problems with an active insight
        counts["retrievals"] = self._count("retrievals")
        return counts

    def _count(self, source: str) -> int:
        return self.query(f"SELECT count(*) FROM {source}")[0][0]

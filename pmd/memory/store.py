"""The memory store: one SQLite file, the single source of truth. One writer, many readers.

This module reads the store; `pmd.memory.update` writes to it through the `Ledger`, in one transaction per update.
Write-ahead logging with synchronous=NORMAL means that a killed process loses nothing that was committed.
"""

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pmd.config.schema import MemoryConfig
from pmd.errors import MemoryStoreError
from pmd.memory import files
from pmd.memory.checksum import refuse_lost_log, settle
from pmd.memory.embed import Embedder
from pmd.types import INSIGHT_KINDS

#: SQL condition for the items that retrieval may return. Internalized items are included, because a frozen teacher
#: knows them only from memory.
LIVE = "status IN ('active', 'internalized')"
#: Table of each level.
TABLES = {0: "experiences", 1: "insights", 2: "behaviours"}
ITEM_TABLE_ROWS = 200
MAX_EVIDENCE = 16  # attempts that an insight is linked to, the newest; more would grow with every epoch


@dataclass(frozen=True, slots=True)
class StoredTask:
    """A training task."""

    id: int
    task_id: str
    domain: str
    memory_key: str
    question: str


@dataclass(frozen=True, slots=True)
class Experience:
    """Level 0: one attempt at a task, thinking stripped."""

    id: int
    task_row: int
    task_id: str
    rollout_id: str
    group_id: str
    policy_version: int
    response: str
    reward: float
    correct: int  # 0 or 1
    feedback: str
    support: int
    status: str


@dataclass(frozen=True, slots=True)
class Insight:
    """Level 1: what the attempts at one task teach."""

    id: int
    task_row: int
    task_id: str
    kind: str
    text: str
    policy_version: int
    support: int
    leak: str
    status: str
    usefulness: float | None = None  # nats per token, from audits
    num_successes: int = 0  # of the group whose reflection wrote it last; 0 of 0 where this is not known
    num_attempts: int = 0


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Level 2: what insights of several tasks have in common."""

    id: int
    text: str
    support: int
    evidence_sha: str
    policy_version: int
    version: int
    status: str
    usefulness: float | None
    member_ids: tuple[int, ...]  # insights
    task_rows: tuple[int, ...]


class MemoryStore:
    """The procedural memory of one run."""

    def __init__(self, db: sqlite3.Connection, path: Path, embedder: Embedder, config: MemoryConfig):
        self.db = db  # only `pmd.memory.update` writes to it
        self.path = path
        self.embedder = embedder
        self.config = config
        self.generation = int(self.meta("generation"))
        self.read_only = bool(self.query("PRAGMA query_only")[0][0])

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        embedder: Embedder | None = None,
        config: MemoryConfig | None = None,
        read_only: bool = False,
    ) -> "MemoryStore":
        """Open a store, or create it if there is none.

        Args:
            embedder: must be the one that the store was built with; None uses the store's own.
            config: the caps that apply to writes.

        Raises:
            MemoryStoreError: the file is damaged, not a store, of an unknown schema version, or of another embedder.
        """
        path = Path(path)
        try:
            exists = path.exists() and path.stat().st_size > 0
        except OSError as error:
            raise files.unusable(path, error) from error
        if not exists and (read_only or embedder is None):
            raise MemoryStoreError(f"memory store={path} does not exist; check the path.")
        if exists:
            refuse_lost_log(path)
        db = files.connect(path, read_only)
        try:
            if embedder is not None and not read_only and files.is_blank(db):
                files.create(db, path, embedder)
            found = files.check_file(db, path, embedder)
            db = files.bring_up_to_date(db, path, read_only)
            files.check_rows(db, path, found)
            if not read_only:
                settle(db, path)
                db.execute("PRAGMA synchronous=NORMAL")
        except BaseException:
            db.close()
            raise
        return cls(db, path, found, config or MemoryConfig())

    def close(self) -> None:
        """Close the file; SQLite folds the write-ahead log into it."""
        self.db.close()

    def __enter__(self) -> "MemoryStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def snapshot(self) -> bytes:
        """Return the committed store as bytes, for a checkpoint."""
        with sqlite3.connect(":memory:") as copy:
            self.db.backup(copy)
            copy.execute("PRAGMA journal_mode=MEMORY")
            data = copy.serialize()
        copy.close()
        return data

    @classmethod
    def restore(cls, path: str | Path, data: bytes) -> None:
        """Replace the file, which must not be open, with a snapshot; a kill midway leaves the old or the new one.

        Raises:
            MemoryStoreError: the bytes are not a valid store; the file is unchanged.
        """
        files.replace(Path(path), data)

    def meta(self, key: str) -> str:
        """Return one value of the `meta` table."""
        return self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0]

    @property
    def history_from(self) -> int:
        """The oldest generation that can still be reconstructed."""
        return history_from(self.db)

    def tasks(self) -> list[StoredTask]:
        """Return all tasks in id order."""
        return [
            StoredTask(*row)
            for row in self.query("SELECT id, task_id, domain, memory_key, question FROM tasks ORDER BY id")
        ]

    def experiences(self, status: str | None = "live") -> list[Experience]:
        """Return the experiences of one status (`live`: those that may be retrieved; None: all) in id order."""
        rows = self.query(
            "SELECT e.id, task_row, task_id, rollout_id, group_id, policy_version, response, reward, correct, feedback,"
            f" support, status FROM experiences e JOIN tasks t ON t.id = task_row"
            f" WHERE {_has_status(status)} ORDER BY e.id"
        )
        return [Experience(*row) for row in rows]

    def insights(self, status: str | None = "live") -> list[Insight]:
        """Return the insights of one status (`live`: those that may be retrieved; None: all) in id order."""
        rows = self.query(
            "SELECT i.id, task_row, task_id, kind, content, policy_version, support, leak, status, usefulness,"
            f" num_successes, num_attempts FROM insights i JOIN tasks t ON t.id = task_row"
            f" WHERE {_has_status(status)} ORDER BY i.id"
        )
        return [Insight(*row) for row in rows]

    def behaviours(self, status: str | None = "live") -> list[Behaviour]:
        """Return the behaviours of one status (`live`: those that may be retrieved; None: all) in id order."""
        members: dict[int, list[int]] = {}
        tasks: dict[int, set[int]] = {}
        for behaviour_id, insight_id, task_row in self.query(
            "SELECT child_id, parent_id, task_row FROM links JOIN insights i ON i.id = parent_id"
            " WHERE child_level = 2 AND parent_level = 1 ORDER BY child_id, parent_id"
        ):
            members.setdefault(behaviour_id, []).append(insight_id)
            tasks.setdefault(behaviour_id, set()).add(task_row)
        rows = self.query(
            "SELECT id, content, support, evidence_sha, policy_version, version, status, usefulness"
            f" FROM behaviours WHERE {_has_status(status)} ORDER BY id"
        )
        return [
            Behaviour(*row, member_ids=tuple(members.get(row[0], ())), task_rows=tuple(sorted(tasks.get(row[0], ()))))
            for row in rows
        ]

    def vectors(self, table: str) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [n] and vectors [n, D] of `tasks`, or of the live `insights` or `behaviours`, in id order.

        Insights have stored vectors only under a costly embedder.
        """
        where = " WHERE embedding IS NOT NULL" if table == "tasks" else f" WHERE {LIVE}"
        rows = self.query(f"SELECT id, embedding FROM {table}{where} ORDER BY id")
        ids = np.array([row[0] for row in rows], dtype=np.int64)
        return ids, blobs_to_matrix((row[1] for row in rows), self.embedder.dimension)

    def query(self, sql: str, *values: Any) -> list[tuple]:
        """Run one read-only statement."""
        return self.db.execute(sql, values).fetchall()

    def query_rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """Run one read-only statement; return the rows as dictionaries."""
        cursor = self.db.execute(sql, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def stats(self) -> dict[str, float]:
        """Count what the store holds, for logs and tables."""
        counts: dict[str, float] = {"generation": self.generation, "tasks": self._count("tasks")}
        for table in TABLES.values():
            counts[table] = self._count(f"{table} WHERE status = 'active'")
        for kind in INSIGHT_KINDS:
            counts[f"kind_{kind}"] = self._count(f"insights WHERE status = 'active' AND kind = '{kind}'")
        for status in ("internalized", "retired", "quarantined"):
            counts[f"insights_{status}"] = self._count(f"insights WHERE status = '{status}'")
        counts["distinct_insights"] = self._count(
            "(SELECT DISTINCT kind, content FROM insights WHERE status = 'active')"
        )
        covered = self.query("SELECT count(DISTINCT task_row) FROM insights WHERE status = 'active'")[0][0]
        counts["coverage"] = covered / max(1, counts["tasks"])  # share of tasks with an active insight
        for key in ("cluster_similarity", "merge_similarity"):  # used in the latest update; absent before the first
            for (value,) in self.query("SELECT CAST(value AS REAL) FROM meta WHERE key = ?", key):
                counts[key] = value
        # All that were ever logged: ids are never reused.
        logged = self.query("SELECT seq FROM sqlite_sequence WHERE name = 'retrievals'")
        counts["retrievals"] = logged[0][0] if logged else 0
        return counts

    def health(self, policy_version: int) -> dict[str, float]:
        """Return the age, duplicates, leaks and usefulness of the items; figures without data are left out."""
        figures = {
            name: self.query(sql.format(live=LIVE), *([policy_version] * sql.count("?")))[0][0]
            for name, sql in _HEALTH.items()
        }
        return {name: float(value) for name, value in figures.items() if value is not None}

    def item_table(self, policy_version: int) -> list[dict[str, Any]]:
        """Return the live behaviours and insights, the best supported first, at most `ITEM_TABLE_ROWS`."""
        return self.query_rows(
            "SELECT 2 AS level, id, 'behaviour' AS kind, content AS text, support, status, usefulness,"
            f" ? - policy_version AS age_policy_steps FROM behaviours WHERE {LIVE}"
            " UNION ALL SELECT 1, id, kind, content, support, status, usefulness, ? - last_policy_version"
            f" FROM insights WHERE {LIVE} ORDER BY 1 DESC, 5 DESC, 2 LIMIT {ITEM_TABLE_ROWS}",
            policy_version,
            policy_version,
        )

    def _count(self, source: str) -> int:
        return self.query(f"SELECT count(*) FROM {source}")[0][0]


class Ledger:
    """Adds, changes and deletes items inside one update, and logs each change. Nothing else modifies items.

    The log keeps what a change replaced, so that earlier generations can be reconstructed from the current one: nothing
    for an addition, the changed columns for a change, the whole row for a deletion. Embeddings are left out, because
    they can be recomputed from the texts. The ledger never commits.
    """

    def __init__(self, db: sqlite3.Connection, generation: int):
        self.db = db
        self.generation = generation  # of this update

    def insert(self, table: str, values: dict[str, Any]) -> int:
        """Insert one row; return its id."""
        columns, marks = ", ".join(values), ", ".join("?" * len(values))
        cursor = self.db.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", tuple(values.values()))
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def add(self, level: int, values: dict[str, Any], reason: str, parents: Iterable[int] = ()) -> int:
        """Insert one item of this generation; return its id."""
        generations = {"generation": self.generation, "last_generation": self.generation}
        item_id = self.insert(TABLES[level], values | generations)
        self._link(level, item_id, parents)
        self._log(level, item_id, "add", None, None, reason)
        return item_id

    def change(
        self, level: int, item_id: int, values: dict[str, Any], reason: str, parents: Iterable[int] | None = None
    ) -> bool:
        """Set columns of one item, and its parents if given; return whether anything changed."""
        old: dict[str, Any] = {}
        if values:
            row = self.db.execute(f"SELECT {', '.join(values)} FROM {TABLES[level]} WHERE id = ?", (item_id,))
            old = dict(zip(values, row.fetchone(), strict=True))
        new = {column: value for column, value in values.items() if value != old[column]}
        before = {column: old[column] for column in new if column != "embedding"}
        after = {column: new[column] for column in before}
        if parents is not None:
            old_parents, new_parents = self.parents(level, item_id), sorted(set(parents))
            if new_parents != old_parents:
                before["parents"], after["parents"] = old_parents, new_parents
                self.db.execute("DELETE FROM links WHERE child_level = ? AND child_id = ?", (level, item_id))
                self._link(level, item_id, new_parents)
        if not after:
            return False
        new["last_generation"] = self.generation
        columns = ", ".join(f"{column} = ?" for column in new)
        self.db.execute(f"UPDATE {TABLES[level]} SET {columns} WHERE id = ?", (*new.values(), item_id))
        self._log(level, item_id, "change", before, after, reason)
        return True

    def count_again(self, level: int, item_id: int, values: dict[str, Any], parents: Iterable[int] = ()) -> None:
        """Add one occurrence and its evidence; a retired item is reactivated, unless audits found it harmful."""
        support, status = self.db.execute(
            f"SELECT support, status FROM {TABLES[level]} WHERE id = ?", (item_id,)
        ).fetchone()
        if status == "retired" and not self.is_harmful(level, item_id):
            status = "active"
        values = {"support": support + 1, "status": status} | values
        evidence = newest_evidence([*self.parents(level, item_id), *parents]) if level > 0 else None
        self.change(level, item_id, values, "seen again", evidence)

    def delete(self, level: int, item_id: int, reason: str) -> None:
        """Delete one item; its id is never reused."""
        cursor = self.db.execute(f"SELECT * FROM {TABLES[level]} WHERE id = ?", (item_id,))
        row = dict(zip([column[0] for column in cursor.description], cursor.fetchone(), strict=True))
        row.pop("embedding", None)
        row["parents"] = self.parents(level, item_id)
        self.db.execute("DELETE FROM links WHERE child_level = ? AND child_id = ?", (level, item_id))
        self.db.execute(f"DELETE FROM {TABLES[level]} WHERE id = ?", (item_id,))
        self._log(level, item_id, "delete", row, None, reason)

    def put_back(self, level: int, row: dict[str, Any], reason: str) -> None:
        """Insert a deleted item again, unchanged and with its old id."""
        values = {column: value for column, value in row.items() if column != "parents"}
        self.insert(TABLES[level], values | {"last_generation": self.generation})
        self._link(level, row["id"], row["parents"])
        self._log(level, row["id"], "add", None, None, reason)

    def is_harmful(self, level: int, item_id: int) -> bool:
        """Whether audits have found the item harmful."""
        found = self.db.execute(
            "SELECT 1 FROM ops WHERE level = ? AND item_id = ? AND reason LIKE 'audit: harmful%' LIMIT 1",
            (level, item_id),
        ).fetchone()
        return found is not None

    def parents(self, level: int, item_id: int) -> list[int]:
        """Return the ids of the items, one level below, that an item is based on."""
        rows = self.db.execute(
            "SELECT parent_id FROM links WHERE child_level = ? AND child_id = ? ORDER BY parent_id", (level, item_id)
        )
        return [row[0] for row in rows]

    def _link(self, level: int, child_id: int, parent_ids: Iterable[int]) -> None:
        rows = [(level, child_id, level - 1, parent_id) for parent_id in parent_ids]
        self.db.executemany("INSERT OR IGNORE INTO links VALUES (?, ?, ?, ?)", rows)

    def _log(
        self,
        level: int,
        item_id: int,
        action: str,
        before: dict[str, Any] | None,
        after: dict[str, Any] | None,
        reason: str,
    ) -> None:
        texts = [
            json.dumps(values, ensure_ascii=False, sort_keys=True) if values is not None else None
            for values in (before, after)
        ]
        self.db.execute(
            "INSERT INTO ops (generation, level, item_id, action, before, after, reason) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (self.generation, level, item_id, action, *texts, reason),
        )


def history_from(db: sqlite3.Connection) -> int:
    """Return the oldest generation that can be reconstructed: 0 in a store that was never compacted."""
    row = db.execute("SELECT value FROM meta WHERE key = 'history_from'").fetchone()
    return int(row[0]) if row is not None else 0


def newest_evidence(parents: Iterable[int]) -> list[int]:
    """Return the ids of the newest attempts that an insight rests on, at most `MAX_EVIDENCE`."""
    return sorted(set(parents))[-MAX_EVIDENCE:]


def vector_blob(vector: np.ndarray) -> bytes:
    """Return one vector as the store keeps it: float32, little endian."""
    return vector.astype("<f4").tobytes()


def blobs_to_matrix(blobs: Iterable[bytes], dimension: int) -> np.ndarray:
    """Return the stored vectors as float32 [n, D]."""
    return np.frombuffer(b"".join(blobs), dtype="<f4").reshape(-1, dimension).astype(np.float32, copy=False)


def _has_status(status: str | None) -> str:
    """Return the SQL condition for one status, for `live` items, or (None) for any status."""
    return {None: "TRUE", "live": LIVE}.get(status, f"status = '{status}'")


#: SQL of the figures in `MemoryStore.health`; `?` is the policy's version.
_HEALTH = {
    "age_policy_steps": "SELECT avg(? - last_policy_version) FROM insights WHERE {live}",
    "duplicate_share": "SELECT 1.0 - count(DISTINCT kind || ':' || content) * 1.0 / count(*) FROM insights"
    " WHERE {live}",
    "leak_rate": "SELECT avg(status = 'quarantined') FROM insights",
    "internalized_rate": "SELECT avg(status = 'internalized') FROM insights WHERE {live}",
    "audited_share": "SELECT avg(usefulness IS NOT NULL) FROM insights WHERE {live}",
    "usefulness_insights": "SELECT avg(usefulness) FROM insights WHERE {live}",
    "usefulness_behaviours": "SELECT avg(usefulness) FROM behaviours WHERE {live}",
    "harmful_share": "SELECT 1.0 * (SELECT count(*) FROM (SELECT DISTINCT level, item_id FROM ops"
    " WHERE reason LIKE 'audit: harmful%'))"
    " / nullif((SELECT count(*) FROM (SELECT DISTINCT level, item_id FROM ops WHERE reason LIKE 'audit%')), 0)",
    "placebo_gap": "SELECT avg(lift_correct) FROM audits WHERE generation = (SELECT max(generation) FROM audits)",
}

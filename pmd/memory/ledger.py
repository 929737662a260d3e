"""Row changes inside one update, each logged: the only statements that add, change or delete items.

The log keeps what a change replaced, so that earlier generations can be read back from the present one: nothing for an
addition, the changed columns for a change, the whole row for a deletion. Embeddings follow from texts and are left out.
"""

import json
import sqlite3
from collections.abc import Iterable
from typing import Any

from pmd.memory.records import TABLES


class Ledger:
    """Writes rows and their log entries; commits nothing itself."""

    def __init__(self, db: sqlite3.Connection, generation: int):
        self.db = db
        self.generation = generation

    def insert(self, table: str, values: dict[str, Any]) -> int:
        """Insert one row; returns its id."""
        columns, marks = ", ".join(values), ", ".join("?" * len(values))
        cursor = self.db.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", tuple(values.values()))
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def add(self, level: int, values: dict[str, Any], reason: str, parents: Iterable[int] = ()) -> int:
        """Insert one item with the generation it belongs to; returns its id."""
        generations = {"generation": self.generation, "last_generation": self.generation}
        item_id = self.insert(TABLES[level], values | generations)
        self._link(level, item_id, parents)
        self._log(level, item_id, "add", None, None, reason)
        return item_id

    def change(
        self, level: int, item_id: int, values: dict[str, Any], reason: str, parents: Iterable[int] | None = None
    ) -> bool:
        """Set columns of one item, and its parents where given; returns whether anything is different now."""
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

    def seen_again(self, level: int, item_id: int, values: dict[str, Any], parents: Iterable[int] = ()) -> None:
        """Count one more sighting and its evidence; a retired item comes back, unless audits found it harmful."""
        support, status = self.db.execute(
            f"SELECT support, status FROM {TABLES[level]} WHERE id = ?", (item_id,)
        ).fetchone()
        if status == "retired" and not self.is_harmful(level, item_id):
            status = "active"
        values = {"support": support + 1, "status": status} | values
        evidence = [*self.parents(level, item_id), *parents] if level > 0 else None
        self.change(level, item_id, values, "seen again", evidence)

    def delete(self, level: int, item_id: int, reason: str) -> None:
        """Delete one item; its id is never used again."""
        cursor = self.db.execute(f"SELECT * FROM {TABLES[level]} WHERE id = ?", (item_id,))
        row = dict(zip([column[0] for column in cursor.description], cursor.fetchone(), strict=True))
        row.pop("embedding", None)
        row["parents"] = self.parents(level, item_id)
        self.db.execute("DELETE FROM links WHERE child_level = ? AND child_id = ?", (level, item_id))
        self.db.execute(f"DELETE FROM {TABLES[level]} WHERE id = ?", (item_id,))
        self._log(level, item_id, "delete", row, None, reason)

    def put_back(self, level: int, row: dict[str, Any], reason: str) -> None:
        """Insert a deleted item as it was, under its old id."""
        values = {column: value for column, value in row.items() if column != "parents"}
        self.insert(TABLES[level], values | {"last_generation": self.generation})
        self._link(level, row["id"], row["parents"])
        self._log(level, row["id"], "add", None, None, reason)

    def is_harmful(self, level: int, item_id: int) -> bool:
        """Whether audits retired the item."""
        found = self.db.execute(
            "SELECT 1 FROM ops WHERE level = ? AND item_id = ? AND reason LIKE 'audit: harmful%' LIMIT 1",
            (level, item_id),
        ).fetchone()
        return found is not None

    def parents(self, level: int, item_id: int) -> list[int]:
        """Return the ids of the items one level below that an item rests on."""
        rows = self.db.execute(
            "SELECT parent_id FROM links WHERE child_level = ? AND child_id = ? ORDER BY parent_id", (level, item_id)
        )
        return [row[0] for row in rows]

    def _link(self, level: int, child_id: int, parent_ids: Iterable[int]) -> None:
        rows = [(level, child_id, level - 1, parent_id) for parent_id in parent_ids]
        self.db.executemany("INSERT OR IGNORE INTO links VALUES (?, ?, ?, ?, 'supports')", rows)

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

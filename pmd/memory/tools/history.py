"""Reconstructs earlier generations from the log of changes, to compare two of them or to roll back to one.

A rollback is a new update that restores the items of an earlier generation, so no history is lost and a rollback can
itself be rolled back. Tasks stay, because they are facts, and so do retrievals and audits.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pmd.errors import MemoryStoreError
from pmd.memory.content import known_columns
from pmd.memory.store import TABLES, Ledger, MemoryStore
from pmd.memory.update import open_writer

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Difference:
    """One item as it was in two generations; None if it did not exist."""

    level: int
    item_id: int
    old: Row | None
    new: Row | None

    @property
    def change(self) -> str:
        """`added`, `deleted`, the new status if that changed, else `edited` or `counted`."""
        if self.old is None or self.new is None:
            return "added" if self.old is None else "deleted"
        if self.old["status"] != self.new["status"]:
            return self.new["status"]
        text = "response" if self.level == 0 else "content"
        return "edited" if self.old[text] != self.new[text] else "counted"

    @property
    def text(self) -> str:
        """The item's text, the newer one if there are two."""
        row = self.new or self.old
        assert row is not None
        return row["response" if self.level == 0 else "content"]


def diff(store: MemoryStore, old: int, new: int) -> list[Difference]:
    """Return the items that differ between two generations, by level and id.

    Raises:
        MemoryStoreError: the store has no such generation.
    """
    for generation in (old, new):
        if not store.history_from <= generation <= store.generation:
            kept = " (memory.keep_generations; earlier ones were dropped)" if store.history_from else ""
            raise MemoryStoreError(
                f"generation={generation} is not in the store, which has {store.history_from} to {store.generation}"
                f"{kept}; choose one of them."
            )
    earlier, later = min(old, new), max(old, new)
    now, then = dict(states(store, later, since=earlier)), dict(states(store, earlier, since=earlier))
    if new < old:
        now, then = then, now
    found = [Difference(*item, then[item], now[item]) for item in sorted(now)]
    return [difference for difference in found if difference.old != difference.new]


def rollback(store: MemoryStore, generation: int) -> list[Difference]:
    """Restore the items of an earlier generation in a new update; return what was undone."""
    undone = diff(store, generation, store.generation)
    reason = f"rollback to generation {generation}"
    with open_writer(store) as writer:
        # Deletions first: a restored item may have the same text as one added since. Later versions of an insight are
        # deleted before, and restored after, the earlier ones that they refer to.
        deletions = [d for d in undone if d.old is None]
        for difference in deletions[::-1] + [d for d in undone if d.old is not None]:
            _put(writer.ledger, difference, reason)
    return undone


def states(store: MemoryStore, generation: int, *, since: int) -> Iterator[tuple[tuple[int, int], Row | None]]:
    """Yield each item changed after `since`, as it was in `generation`."""
    touched = store.query("SELECT DISTINCT level, item_id FROM ops WHERE generation > ? ORDER BY 1, 2", since)
    for level, item_id in touched:
        row = _present(store, level, item_id)
        changes = store.query(
            "SELECT action, before FROM ops WHERE level = ? AND item_id = ? AND generation > ? ORDER BY id DESC",
            level,
            item_id,
            generation,
        )
        for action, before in changes:
            if action == "add":
                row = None
            elif action == "delete" or row is not None:
                row = {**(row or {}), **_read_change(level, before, whole=action == "delete")}
            else:
                raise ValueError(f"its history changes item {item_id} of table {TABLES[level]}, which it has not")
        if row is not None:
            row.pop("last_generation", None)  # a time, not content
        yield (level, item_id), row


def _read_change(level: int, text: str, *, whole: bool) -> Row:
    """Parse what a change replaced.

    Raises:
        ValueError: a name, which becomes part of SQL statements, is no column of the table, or one is missing.
    """
    row = json.loads(text)
    columns = known_columns(TABLES[level]).keys() - {"embedding"} | {"parents"}
    wrong = sorted(row.keys() ^ columns if whole else row.keys() - columns)
    if wrong:
        raise ValueError(f"its history of table {TABLES[level]} is wrong in the column {wrong[0]!r}")
    return row


def _present(store: MemoryStore, level: int, item_id: int) -> Row | None:
    rows = store.query_rows(f"SELECT * FROM {TABLES[level]} WHERE id = ?", item_id)
    if not rows:
        return None
    row = rows[0]
    row.pop("embedding", None)
    parents = store.query(
        "SELECT parent_id FROM links WHERE child_level = ? AND child_id = ? ORDER BY parent_id", level, item_id
    )
    return row | {"parents": [parent for (parent,) in parents]}


def _put(ledger: Ledger, difference: Difference, reason: str) -> None:
    """Restore one item to its state in the old generation."""
    level, item_id, old, new = difference.level, difference.item_id, difference.old, difference.new
    if old is None:
        ledger.delete(level, item_id, reason)
    elif new is None:
        ledger.put_back(level, old, reason)
    else:
        values = {column: value for column, value in old.items() if column != "parents" and value != new[column]}
        if "content" in values:
            values["embedding"] = None
        ledger.change(level, item_id, values, reason, old["parents"])

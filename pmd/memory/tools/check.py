"""Checks a store against the rules that SQLite does not enforce, and its index file against the store."""

import numpy as np

from pmd.memory.checksum import interrupted
from pmd.memory.files import one_line
from pmd.memory.index import TaskIndex
from pmd.memory.store import MemoryStore

_HISTORY_FROM = "coalesce((SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'history_from'), 0)"
#: Each problem, and a statement that selects the rows that have it.
RULES = {
    "a task is not of the training split": "SELECT id FROM tasks WHERE split != 'train'",
    "a task or behaviour has no vector": "SELECT id FROM tasks WHERE embedding IS NULL"
    " UNION ALL SELECT id FROM behaviours WHERE embedding IS NULL",
    "a link has no child": "SELECT child_id FROM links WHERE"
    " (child_level = 1 AND child_id NOT IN (SELECT id FROM insights))"
    " OR (child_level = 2 AND child_id NOT IN (SELECT id FROM behaviours))",
    "a link has no parent": "SELECT parent_id FROM links WHERE"
    " (parent_level = 0 AND parent_id NOT IN (SELECT id FROM experiences))"
    " OR (parent_level = 1 AND parent_id NOT IN (SELECT id FROM insights))",
    "an active behaviour rests on no insight": "SELECT id FROM behaviours WHERE status = 'active'"
    " AND id NOT IN (SELECT child_id FROM links WHERE child_level = 2)",
    "a leaking item is not quarantined": "SELECT id FROM insights WHERE leak != '' AND status = 'active'",
    "an item has no history": "SELECT id FROM insights WHERE id NOT IN (SELECT item_id FROM ops WHERE level = 1)"
    f" AND generation > {_HISTORY_FROM} UNION ALL SELECT id FROM behaviours"
    f" WHERE id NOT IN (SELECT item_id FROM ops WHERE level = 2) AND generation > {_HISTORY_FROM}",
    "something is newer than the store's generation": "SELECT id FROM ops WHERE generation >"
    " (SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'generation')",
}


def check(store: MemoryStore) -> list[str]:
    """Return what is wrong with the store and its index file, one sentence each; empty if nothing is."""
    wrong = [
        f"the file is damaged: {one_line(row[0])}" for row in store.query("PRAGMA integrity_check(5)") if row[0] != "ok"
    ]
    wrong += [f"a reference of {row[0]} row {row[1]} points nowhere" for row in store.query("PRAGMA foreign_key_check")]
    for meaning, sql in RULES.items():
        found = store.query(sql)
        if found:
            wrong.append(f"{meaning}: {len(found)}, first id {found[0][0]}")
    if not any("vector" in sentence for sentence in wrong):
        for table in ("tasks", "behaviours"):
            lengths = np.linalg.norm(store.vectors(table)[1], axis=1)
            bad = int((~(np.abs(lengths - 1.0) < 1e-3)).sum())
            if bad:
                wrong.append(f"vectors of {table} are not of length 1: {bad}")
    unfinished = interrupted(store.path, store.generation)
    wrong += [unfinished] if unfinished else []
    stale = TaskIndex(store).mismatch()
    if stale:
        wrong.append(f"the index file is not the store's: {stale}; `pmd memory rebuild` rebuilds it")
    return wrong

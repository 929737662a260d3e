"""Bounds a store: drops log rows older than the generations that are kept, and items retired before them.

Every generation from `history_from` on can still be compared and restored, because what is dropped was the same in all
of them. Kept whatever their age: live and quarantined items with their evidence, items that audits found harmful (so
that they never come back), audits that still count, and per item the last log row of each verdict that audits gave.
A retired item that is written again after it was dropped begins anew.
"""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from pmd.atomic import replace_text

MAX_AUDITS = 100  # of one version of an item; two standard errors of a mean of 100 are small enough for any verdict

_LEVELS = {"behaviours": 2, "insights": 1}  # of the items that rest on others
#: Of the ops after `history_from`, the ids in a list of parents; an op of one level lists parents of the level below.
_LISTED = (
    "SELECT value FROM ops, json_each({column}, '$.parents') WHERE ops.generation > :since AND ops.level = {level}"
)
_LISTED_BEFORE_OR_AFTER = " UNION ".join(_LISTED.format(column=c, level="{level}") for c in ("before", "after"))
_ITEMS = (
    "SELECT 0 AS level, id, 1 AS version FROM experiences UNION ALL SELECT 1, id, version FROM insights"
    " UNION ALL SELECT 2, id, version FROM behaviours"
)
#: Version of each item in the oldest kept generation; later changes and deletions name the version they replaced.
_VERSIONS = (
    f"SELECT level, id, min(version) AS version FROM ({_ITEMS} UNION ALL SELECT level, item_id,"
    " json_extract(before, '$.version') FROM ops WHERE generation > :since"
    " AND json_extract(before, '$.version') IS NOT NULL) GROUP BY level, id"
)
#: What is dropped, in this order: rows go before the rows they refer to.
_DROPPED = (
    ("retrievals", "generation < :since"),
    ("behaviours", "status = 'retired' AND last_generation <= :since"),
    (
        "insights",
        "status = 'retired' AND last_generation <= :since"
        " AND id NOT IN (SELECT item_id FROM ops WHERE level = 1 AND reason LIKE 'audit: harmful%')"
        " AND id NOT IN (SELECT parent_id FROM links JOIN behaviours ON id = child_id"
        "  WHERE parent_level = 1 AND child_level = 2)"
        f" AND id NOT IN ({_LISTED_BEFORE_OR_AFTER.format(level=2)})"
        " AND id NOT IN (SELECT json_extract(before, '$.previous_id') FROM ops WHERE generation > :since"
        "  AND level = 1 AND json_extract(before, '$.previous_id') IS NOT NULL)",
    ),
    (
        "experiences",
        "status = 'retired' AND last_generation <= :since"
        " AND id NOT IN (SELECT parent_id FROM links JOIN insights ON id = child_id"
        "  WHERE parent_level = 0 AND child_level = 1)"
        f" AND id NOT IN ({_LISTED_BEFORE_OR_AFTER.format(level=1)})",
    ),
    (
        "audits",
        "generation <= :since AND (id NOT IN (SELECT a.id FROM audits a JOIN versions v ON v.level = a.level"
        " AND v.id = a.item_id AND v.version <= a.version)"
        " OR id IN (SELECT id FROM (SELECT id, row_number() OVER"
        f" (PARTITION BY level, item_id, version ORDER BY id DESC) AS age FROM audits) WHERE age > {MAX_AUDITS}))",
    ),
    (
        "ops",
        "generation <= :since AND id NOT IN (SELECT max(ops.id) FROM ops JOIN items ON items.level = ops.level"
        " AND items.id = item_id WHERE generation <= :since AND reason LIKE 'audit%'"
        " GROUP BY ops.level, item_id, json_extract(after, '$.status'))",
    ),
)


def history_from(db: sqlite3.Connection) -> int:
    """Return the oldest generation that can be reconstructed: 0 in a store that was never compacted."""
    row = db.execute("SELECT value FROM meta WHERE key = 'history_from'").fetchone()
    return int(row[0]) if row is not None else 0


def compact(db: sqlite3.Connection, generation: int, keep: int, archive: Path | None) -> dict[str, int]:
    """Drop what is older than `keep` generations, inside the open transaction; return the rows dropped by table.

    Args:
        generation: the one that this transaction writes.
        archive: a folder; what is dropped is written to a file in it first, complete or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    since = generation - keep
    if since <= history_from(db):
        return {}
    counts: dict[str, int] = {}
    lines: list[str] = []
    for table, condition in _DROPPED:
        sql = (
            f"WITH items AS ({_ITEMS}), versions AS ({_VERSIONS}) SELECT id FROM {table} WHERE {condition} ORDER BY id"
        )
        ids = db.execute(sql, {"since": since}).fetchall()
        if archive is not None:
            lines += _lines(db, table, [row_id for (row_id,) in ids])
        _delete(db, table, ids)
        counts[table] = len(ids)
    db.execute("INSERT OR REPLACE INTO meta VALUES ('history_from', ?)", (str(since),))
    if archive is not None and lines:
        _write(archive / f"generation-{generation:06d}.jsonl", lines)
    return counts


def _delete(db: sqlite3.Connection, table: str, ids: list[tuple[int]]) -> None:
    """Delete the rows, with links to their evidence; the next version of a dropped insight no longer names it."""
    if not ids:
        return
    if table == "insights":  # for the references of `previous_id`, which SQLite also looks up for each deleted row
        db.execute("CREATE INDEX insights_by_previous ON insights (previous_id) WHERE previous_id IS NOT NULL")
        db.executemany("UPDATE insights SET previous_id = NULL WHERE previous_id = ?", ids)
    db.executemany(f"DELETE FROM {table} WHERE id = ?", ids)
    if table == "insights":
        db.execute("DROP INDEX insights_by_previous")
    if table in _LEVELS:
        db.executemany(f"DELETE FROM links WHERE child_level = {_LEVELS[table]} AND child_id = ?", ids)


def _lines(db: sqlite3.Connection, table: str, ids: list[int]) -> Iterator[str]:
    """Yield the rows as JSON, items with the ids of their evidence; vectors are left out."""
    for row_id in ids:
        cursor = db.execute(f"SELECT * FROM {table} WHERE id = ?", (row_id,))
        row = dict(zip([column[0] for column in cursor.description], cursor.fetchone(), strict=True))
        row.pop("embedding", None)
        if table in _LEVELS:
            parents = db.execute(
                "SELECT parent_id FROM links WHERE child_level = ? AND child_id = ? ORDER BY 1",
                (_LEVELS[table], row_id),
            )
            row["parents"] = [parent for (parent,) in parents]
        yield json.dumps({"table": table} | row, ensure_ascii=False) + "\n"


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(lines))

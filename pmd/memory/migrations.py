"""Migrates store files of earlier schema versions to the current one, step by step, in one transaction.

The statements of a step never change. A migrated file has the same columns in the same order as a new one. The log of
changes is migrated too, so diffs and rollbacks work across a migration.

Version 2 -> 3: `problems` becomes `tasks`, `problem_id` becomes `task_row`, and the status `absorbed` becomes
`internalized`. Columns that were never filled are dropped, as are a behaviour's polarity, a link's relation and a
retrieval's propensity. The status `shadow`, for insights on probation, no longer exists: such items become active, and
their history is rewritten as if they had always been.

Version 3 -> 4: insights have the share of successes behind them, which earlier ones do not know.
"""

import sqlite3

SCHEMA_VERSION = 4

#: SQL for the status of a copied row: old statuses get their new names.
_STATUS = "CASE status WHEN 'absorbed' THEN 'internalized' WHEN 'shadow' THEN 'active' ELSE status END"
_INSIGHT_COLUMNS = (
    "content, policy_version, last_policy_version, version, previous_id, support, usefulness, leak, status,"
    " generation, last_generation, embedding"
)
_RETRIEVAL_COLUMNS = "id, generation, step, group_id, level, item_id, rank, similarity, score, included"
_BEHAVIOUR_COLUMNS = (
    "content, support, evidence_sha, policy_version, version, usefulness, status, generation, last_generation,"
    " embedding"
)


def _rebuilt(table: str, columns: str, selected: str, definition: str) -> tuple[str, ...]:
    """Return the statements that rebuild a table with a new definition, keeping its next id."""
    return (
        f"CREATE TABLE new_{table} ({definition})",
        f"INSERT INTO new_{table} ({columns}) SELECT {selected} FROM {table} ORDER BY id",
        f"DELETE FROM sqlite_sequence WHERE name = 'new_{table}'",
        f"INSERT INTO sqlite_sequence SELECT 'new_{table}', seq FROM sqlite_sequence WHERE name = '{table}'",
        f"DROP TABLE {table}",
        f"ALTER TABLE new_{table} RENAME TO {table}",
    )


def _rewritten_log(column: str) -> tuple[str, ...]:
    """Return the statements that migrate `ops.before` or `ops.after` to version 3."""
    removed = ("title", "applies_when", "not_when", "pitfalls", "model", "prompt_version", "polarity")
    paths = ", ".join(f"'$.{name}'" for name in removed)
    return (
        f"UPDATE ops SET {column} = json_remove(json_set({column}, '$.task_row', json_extract({column},"
        f" '$.problem_id')), '$.problem_id') WHERE json_type({column}, '$.problem_id') IS NOT NULL",
        f"UPDATE ops SET {column} = json_remove({column}, {paths}) WHERE {column} IS NOT NULL",
        f"UPDATE ops SET {column} = json_remove({column}, '$.leak') WHERE level = 2 AND {column} IS NOT NULL",
        f"UPDATE ops SET {column} = json_set({column}, '$.status', 'internalized')"
        f" WHERE json_extract({column}, '$.status') = 'absorbed'",
        f"UPDATE ops SET {column} = json_set({column}, '$.status', 'active')"
        f" WHERE json_extract({column}, '$.status') = 'shadow'",
    )


#: Version -> the statements that migrate it to the next.
STEPS: dict[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE audits ADD COLUMN version INTEGER NOT NULL DEFAULT 1",
        "ALTER TABLE audits ADD COLUMN num_correct INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE audits ADD COLUMN num_wrong INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE audits ADD COLUMN masked_lift_correct REAL",
        "ALTER TABLE audits ADD COLUMN masked_lift_wrong REAL",
        "ALTER TABLE audits ADD COLUMN student_lift REAL",
        "CREATE INDEX audits_by_item ON audits (level, item_id)",
    ),
    2: (
        "ALTER TABLE problems RENAME TO tasks",
        "ALTER TABLE experiences RENAME COLUMN problem_id TO task_row",
        "ALTER TABLE experiences DROP COLUMN model",
        "DELETE FROM links WHERE relation != 'supports'",
        "ALTER TABLE links DROP COLUMN relation",
        *_rebuilt(
            "insights",
            f"id, task_row, kind, {_INSIGHT_COLUMNS}",
            f"id, problem_id, kind, {_INSIGHT_COLUMNS.replace('status', _STATUS)}",
            "id INTEGER PRIMARY KEY AUTOINCREMENT, task_row INTEGER NOT NULL REFERENCES tasks (id),"
            " kind TEXT NOT NULL, content TEXT NOT NULL,"
            " policy_version INTEGER NOT NULL, last_policy_version INTEGER NOT NULL,"
            " version INTEGER NOT NULL DEFAULT 1, previous_id INTEGER REFERENCES insights (id),"
            " support INTEGER NOT NULL DEFAULT 1, usefulness REAL, leak TEXT NOT NULL DEFAULT '',"
            " status TEXT NOT NULL DEFAULT 'active'"
            " CHECK (status IN ('active', 'internalized', 'retired', 'quarantined')),"
            " generation INTEGER NOT NULL, last_generation INTEGER NOT NULL, embedding BLOB,"
            " UNIQUE (task_row, kind, content)",
        ),
        "CREATE INDEX insights_by_status ON insights (status, kind, content)",
        *_rebuilt(
            "behaviours",
            f"id, {_BEHAVIOUR_COLUMNS}",
            f"id, {_BEHAVIOUR_COLUMNS.replace('status', _STATUS)}",
            "id INTEGER PRIMARY KEY AUTOINCREMENT, content TEXT NOT NULL, support INTEGER NOT NULL,"
            " evidence_sha TEXT NOT NULL, policy_version INTEGER NOT NULL, version INTEGER NOT NULL DEFAULT 1,"
            " usefulness REAL, status TEXT NOT NULL DEFAULT 'active'"
            " CHECK (status IN ('active', 'internalized', 'retired', 'quarantined')),"
            " generation INTEGER NOT NULL, last_generation INTEGER NOT NULL, embedding BLOB",
        ),
        *_rebuilt(  # DROP COLUMN would leave the closing bracket in the comment of the column before
            "retrievals",
            _RETRIEVAL_COLUMNS,
            _RETRIEVAL_COLUMNS,
            "id INTEGER PRIMARY KEY AUTOINCREMENT, generation INTEGER NOT NULL, step INTEGER NOT NULL,"
            " group_id TEXT NOT NULL, level INTEGER NOT NULL, item_id INTEGER NOT NULL, rank INTEGER NOT NULL,"
            " similarity REAL NOT NULL, score REAL, included INTEGER NOT NULL DEFAULT 1",
        ),
        *_rewritten_log("before"),
        *_rewritten_log("after"),
        "UPDATE ops SET reason = replace(reason, 'absorbed', 'internalized') WHERE reason LIKE 'audit:%absorbed%'",
    ),
    3: (
        "ALTER TABLE insights ADD COLUMN num_successes INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE insights ADD COLUMN num_attempts INTEGER NOT NULL DEFAULT 0",
        "UPDATE ops SET before = json_set(before, '$.num_successes', 0, '$.num_attempts', 0)"
        " WHERE level = 1 AND action = 'delete'",
    ),
}


def migrate(db: sqlite3.Connection, version: int) -> None:
    """Apply the steps from `version` on, all or nothing.

    Raises:
        sqlite3.DatabaseError: a statement fails, or a foreign key would point to a missing row.
    """
    db.execute("PRAGMA foreign_keys=OFF")  # a table that others refer to cannot be replaced otherwise
    db.execute("BEGIN IMMEDIATE")
    try:
        for step in range(version, SCHEMA_VERSION):
            for statement in STEPS[step]:
                db.execute(statement)
        dangling = db.execute("PRAGMA foreign_key_check").fetchone()
        if dangling is not None:
            raise sqlite3.IntegrityError(f"a reference of {dangling[0]} row {dangling[1]} points nowhere")
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    finally:
        db.execute("PRAGMA foreign_keys=ON")

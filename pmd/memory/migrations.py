"""Store files of earlier schema versions brought up to the present one, step by step, in one transaction.

A step's statements never change once released. What a step adds stands last in its table, so that a migrated file and
a new one have the same columns in the same order.
"""

import sqlite3

SCHEMA_VERSION = 2
#: Version -> the statements that lead from it to the next.
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
}


def migrate(db: sqlite3.Connection, version: int) -> None:
    """Apply the steps from `version` on; whole or not at all."""
    db.execute("BEGIN IMMEDIATE")
    try:
        for step in range(version, SCHEMA_VERSION):
            for statement in STEPS[step]:
                db.execute(statement)
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise

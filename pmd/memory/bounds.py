"""What must leave when a cap is reached. Every choice is by stored values and ids, so two equal builds stay equal."""

from pmd.memory.ledger import Ledger
from pmd.memory.records import LIVE


def bound_experiences(ledger: Ledger, problem_id: int, correct: bool, cap: int) -> None:
    """Retire the oldest successes (or failures) of a problem above the cap."""
    surplus = ledger.db.execute(
        "SELECT id FROM experiences WHERE problem_id = ? AND correct = ? AND status = 'active'"
        " ORDER BY last_generation DESC, policy_version DESC, id DESC LIMIT -1 OFFSET ?",
        (problem_id, int(correct), cap),
    ).fetchall()
    for (experience_id,) in surplus:
        ledger.change(0, experience_id, {"status": "retired"}, "cap of the problem")


def delete_unlinked_experiences(ledger: Ledger) -> None:
    """Delete retired experiences that no insight rests on: level 0 stays bounded."""
    unlinked = ledger.db.execute(
        "SELECT id FROM experiences WHERE status = 'retired' AND NOT EXISTS"
        " (SELECT 1 FROM links WHERE parent_level = 0 AND parent_id = experiences.id) ORDER BY id"
    ).fetchall()
    for (experience_id,) in unlinked:
        ledger.delete(0, experience_id, "retired and no evidence of anything")


def bound_insights(ledger: Ledger, problem_id: int, keep: int, cap: int) -> None:
    """Retire insights of a problem above the cap, never the one just written.

    What is absorbed gives way first, then the kind that the problem has most of (lessons before others where equal),
    so that lessons cannot drive out a strategy; within it the least supported, then the oldest.
    """
    rows = ledger.db.execute(  # `+` keeps SQLite from walking the index of all active insights
        f"SELECT id, kind, support, status FROM insights WHERE problem_id = ? AND (+{LIVE} OR +status = 'shadow')"
        " ORDER BY id",
        (problem_id,),
    ).fetchall()
    while len(rows) > cap:
        count = {kind: sum(row[1] == kind for row in rows) for kind in {row[1] for row in rows}}
        candidates = [row for row in rows if row[0] != keep]
        leaving = min(
            candidates, key=lambda row: (row[3] != "absorbed", -count[row[1]], row[1] != "lesson", row[2], row[0])
        )
        ledger.change(1, leaving[0], {"status": "retired"}, "cap of the problem")
        rows.remove(leaving)


def bound_store(ledger: Ledger, capacity: int) -> None:
    """Retire active insights above the capacity: the oldest copies of a text first, then the longest unseen."""
    active = ledger.db.execute(f"SELECT count(*) FROM insights WHERE {LIVE}").fetchone()[0]
    if active <= capacity:
        return
    leaving = ledger.db.execute(
        "SELECT id, copies > 1 FROM (SELECT id, last_generation,"
        " row_number() OVER (PARTITION BY kind, content ORDER BY id DESC) AS copies"
        f" FROM insights WHERE {LIVE})"
        " ORDER BY copies > 1 DESC, CASE WHEN copies > 1 THEN id ELSE last_generation END, id LIMIT ?",
        (active - capacity,),
    ).fetchall()
    for insight_id, redundant in leaving:
        reason = "capacity: a newer copy exists" if redundant else "capacity: longest unseen"
        ledger.change(1, insight_id, {"status": "retired"}, reason)

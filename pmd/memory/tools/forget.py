"""Forgets a task on request: its attempts and insights go, and what was distilled from them loses that evidence.

The task's own row stays, because the log refers to it; the log keeps what was deleted, for `diff` and `rollback`, until
compaction drops it.
"""

from pmd.errors import MemoryStoreError
from pmd.memory.store import MemoryStore
from pmd.memory.update import Writer, open_writer


def forget_task(store: MemoryStore, task_id: str) -> dict[str, int]:
    """Delete a task's items in one update; return how many of each kind are gone, or rest on less than before.

    A behaviour that would rest on fewer tasks than `memory.cluster_support` is deleted too.

    Raises:
        MemoryStoreError: the store has no such task, or cannot be written.
    """
    row = store.query("SELECT id FROM tasks WHERE task_id = ?", task_id)
    if not row:
        raise MemoryStoreError(f"task_id={task_id} is not in {store.path}; `pmd memory list STORE task` shows its ids.")
    task_row, reason = row[0][0], f"task {task_id} forgotten"
    with open_writer(store) as writer:
        counts = _weaken_behaviours(writer, task_row, reason)
        # A later version of an insight refers to the earlier one, and insights to attempts: the newest go first.
        for name, level in (("insights", 1), ("experiences", 0)):
            ids = [i for (i,) in store.query(f"SELECT id FROM {name} WHERE task_row = ? ORDER BY id DESC", task_row)]
            for item_id in ids:
                writer.ledger.delete(level, item_id, reason)
            counts[name] = len(ids)
    return counts


def _weaken_behaviours(writer: Writer, task_row: int, reason: str) -> dict[str, int]:
    """Take the task's insights from the evidence of behaviours; delete those that are left with too little."""
    ledger, own = (
        writer.ledger,
        {i for (i,) in writer.store.query("SELECT id FROM insights WHERE task_row = ?", task_row)},
    )
    marks = ", ".join("?" * len(own))
    resting = writer.store.query(
        f"SELECT DISTINCT child_id FROM links WHERE child_level = 2 AND parent_id IN ({marks}) ORDER BY 1", *sorted(own)
    )
    counts = {"behaviours": 0, "behaviours with less evidence": 0}
    for (behaviour,) in resting:
        parents = [parent for parent in ledger.parents(2, behaviour) if parent not in own]
        marks = ", ".join("?" * len(parents))
        found = writer.store.query(f"SELECT count(DISTINCT task_row) FROM insights WHERE id IN ({marks})", *parents)
        support = found[0][0]
        if support < writer.store.config.cluster_support:
            ledger.delete(2, behaviour, reason)
            counts["behaviours"] += 1
        else:
            ledger.change(2, behaviour, {"support": support}, reason, parents)
            counts["behaviours with less evidence"] += 1
    return counts

"""Subcommands of `pmd memory` that compare, check, export and import stores, and the lineage of one item."""

import argparse
from collections import Counter
from typing import Any

from pmd.errors import ConfigError, MemoryStoreError
from pmd.memory.held_out import HeldOut
from pmd.memory.index import TaskIndex
from pmd.memory.store import TABLES, MemoryStore
from pmd.memory.tools.check import check
from pmd.memory.tools.compact import compact_store
from pmd.memory.tools.forget import forget_task
from pmd.memory.tools.history import Difference, diff, rollback
from pmd.memory.tools.report import render
from pmd.memory.tools.transfer import export_file, import_file

Rows = list[dict[str, Any]]
WRITING = frozenset({"rebuild", "rollback", "import", "compact", "forget"})


def lineage(store: MemoryStore, level: int, item_id: int) -> Rows:
    """Return all ancestors and descendants of an item, the lowest level first."""
    items = {(level, item_id): "this item"}
    for own, other, word in (("child", "parent", "evidence"), ("parent", "child", "rests on it")):
        frontier = {(level, item_id)}
        while frontier:
            frontier = {
                found
                for near_level, near_id in frontier
                for found in store.query(
                    f"SELECT {other}_level, {other}_id FROM links WHERE {own}_level = ? AND {own}_id = ?",
                    near_level,
                    near_id,
                )
            } - items.keys()
            items |= dict.fromkeys(frontier, word)
    rows: Rows = []
    for (other_level, other_id), role in sorted(items.items()):
        text = "response" if other_level == 0 else "content"
        found = store.query(f"SELECT status, {text} FROM {TABLES[other_level]} WHERE id = ?", other_id)
        status, words = found[0] if found else ("deleted", "")
        rows.append({"level": other_level, "id": other_id, "role": role, "status": status, "text": words})
    return rows


def _diff(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
    found = diff(store, arguments.old, arguments.new)
    shown = [difference for difference in found if arguments.all or difference.change != "counted"]
    return {
        f"from generation {arguments.old} to {arguments.new}": _count(found),
        "items": [
            {"change": d.change, "level": d.level, "id": d.item_id, "text": d.text} for d in shown
        ],
    }  # fmt: skip


def _rollback(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
    undone = rollback(store, arguments.generation)
    return {f"generation {store.generation} is {arguments.generation} again; undone": _count(undone)}


def _count(differences: list[Difference]) -> Rows:
    counts = Counter((difference.level, difference.change) for difference in differences)
    return [{"level": level, "change": change, "items": n} for (level, change), n in sorted(counts.items())]


def _check(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
    return {"wrong with the store": [{"finding": sentence} for sentence in check(store)]}


def _compact(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
    before = store.path.stat().st_size
    dropped = compact_store(store, arguments.keep, archive=arguments.archive)
    size = f"{before / 1e6:.2f} -> {store.path.stat().st_size / 1e6:.2f}"
    facts = {"generations that can be compared": f"{store.history_from} to {store.generation}", "megabytes": size}
    return {
        "compacted": [{"quantity": key, "value": value} for key, value in facts.items()],
        "rows dropped": [{"table": table, "rows": rows} for table, rows in dropped.items()],
    }


def _forget(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
    counts = forget_task(store, arguments.task)
    return {f"forgotten of task {arguments.task}": [{"kind": kind, "items": count} for kind, count in counts.items()]}


def _rebuild(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
    index = TaskIndex(store)
    index.refresh()
    return {"task index": [{"file": str(store.path.with_name("tasks.hnsw")), "tasks": len(index)}]}


def _export(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
    lines = export_file(store, arguments.file, experiences=arguments.experiences)
    return {"exported": [{"file": str(arguments.file), "lines": lines}]}


def _import(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
    held_out = None if arguments.unchecked else _held_out(store, arguments)
    counts = import_file(store, arguments.file, held_out=held_out)
    TaskIndex(store).refresh()  # built anew: a graph beside a stranger's store is not to be trusted
    tables = {"imported": [{"type": kind, "new": count} for kind, count in counts.items()]}
    return tables if held_out is not None else tables | {"held-out tasks": [{"note": _NOT_COMPARED}]}


_NOT_COMPARED = (
    "not compared: the store belongs to no run, or --unchecked was given. --config FILE names those to refuse; a run "
    "that opens this store refuses its own."
)


def _held_out(store: MemoryStore, arguments: argparse.Namespace) -> HeldOut | None:
    """Return the held-out tasks of the store's run, or of the configuration given; None if neither names any.

    Raises:
        MemoryStoreError: the configuration or its data cannot be read.
    """
    from pmd.config.load import load_config
    from pmd.tasks import load_tasks

    own = store.path.resolve().parent.parent / "config.yaml"
    files = arguments.config or ([own] if own.is_file() else [])
    if not files:
        return None
    try:
        loaded = load_config(files)
        if loaded.problems:
            raise ConfigError(loaded.problems)
        return HeldOut(load_tasks(loaded.run.data, loaded.run.seed_everything))
    except ConfigError as error:
        raise MemoryStoreError(
            f"the held-out tasks of {files[0]} cannot be read ({error}); nothing was imported. Give --config FILE "
            "whose data can be read, or --unchecked to import without comparing."
        ) from error


def _audit(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
    levels = store.query_rows(
        "SELECT CASE level WHEN 1 THEN 'insight' ELSE 'behaviour' END AS level, count(*) AS audits,"
        " count(DISTINCT item_id) AS items, avg(lift_correct) AS lift_correct, avg(lift_wrong) AS lift_wrong,"
        " avg(usefulness) AS usefulness, avg(masked_usefulness) AS answer_masked, avg(student_lift) AS student_lift"
        " FROM audits GROUP BY audits.level ORDER BY audits.level"
    )
    outcomes = store.query_rows(
        "SELECT CASE level WHEN 1 THEN 'insight' ELSE 'behaviour' END AS level,"
        " json_extract(after, '$.status') AS status, count(*) AS items FROM ops"
        " WHERE reason LIKE 'audit%' AND json_extract(after, '$.status') IS NOT NULL GROUP BY 1, 2 ORDER BY 1, 2"
    )
    items = (
        "SELECT 'insight' AS level, id, kind, status, usefulness, content AS text FROM insights UNION ALL"
        " SELECT 'behaviour', id, 'behaviour', status, usefulness, content FROM behaviours"
    )
    ends = {
        title: store.query_rows(
            "SELECT level, min(id) AS id, count(*) AS items, kind, status, avg(usefulness) AS usefulness, text"
            f" FROM ({items}) WHERE usefulness {sign} 0 GROUP BY level, kind, status, text"
            f" ORDER BY usefulness {order}, level, id LIMIT ?",
            arguments.limit or -1,
        )
        for title, sign, order in (("most useful", ">", "DESC"), ("most harmful", "<", "ASC"))
    }
    return {"audits, nats per token against a placebo": levels, "changes that audits made": outcomes} | ends


def _report(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
    path = arguments.out or store.path.with_name("report.html")
    name = arguments.store.resolve().name if arguments.store.is_dir() else arguments.store.stem
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(render(store, f"Memory of {name}"), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return {"report": [{"file": str(path), "kilobytes": round(path.stat().st_size / 1e3)}]}


COMMANDS = {
    "audit": _audit,
    "report": _report,
    "diff": _diff,
    "rollback": _rollback,
    "check": _check,
    "rebuild": _rebuild,
    "compact": _compact,
    "forget": _forget,
    "export": _export,
    "import": _import,
}

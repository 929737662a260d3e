"""What `stats`, `list`, `show` and `search` of `python -m pmd memory` print, and their tables on the terminal."""

import argparse
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pmd.cli import memory_tools
from pmd.cli.printable import printable
from pmd.config.schema import MemoryConfig
from pmd.errors import MemoryStoreError
from pmd.memory.index import TaskIndex
from pmd.memory.retrieve import Retriever
from pmd.memory.store import MemoryStore

Rows = list[dict[str, Any]]
LEVELS = ("experience", "insight", "behaviour")


def stats_rows(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
    """Return counts of what the store holds."""
    facts: dict[str, Any] = {"file": str(store.path), "megabytes": round(store.path.stat().st_size / 1e6, 2)}
    facts |= {"embedder": store.meta("embedder"), "schema version": store.query("PRAGMA user_version")[0][0]}
    facts |= store.stats()
    return {"memory": [{"quantity": key, "value": value} for key, value in facts.items()]}


def list_rows(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
    """Return the items of one level, best supported first."""
    columns, source, order = {
        "task": (
            "t.id, task_id, domain, memory_key AS text,"
            " (SELECT count(*) FROM insights i WHERE i.task_row = t.id AND status = 'active') AS insights",
            "tasks t",
            "t.id",
        ),
        "experience": (
            "e.id, task_id, correct, policy_version AS policy, e.support, status, response AS text",
            "experiences e JOIN tasks t ON t.id = task_row",
            "e.id",
        ),
        "insight": (
            "i.id, task_id, kind, policy_version AS policy, i.support, status, leak, content AS text",
            "insights i JOIN tasks t ON t.id = task_row",
            "i.support DESC, i.id",
        ),
        "behaviour": (
            "id, version, policy_version AS policy, support, status, content AS text",
            "behaviours",
            "support DESC, id",
        ),
    }[arguments.what]
    conditions, values = ["TRUE"], []
    if arguments.what != "task" and arguments.status != "all":
        conditions.append("status = ?")
        values.append(arguments.status or "active")
    if arguments.kind:
        conditions.append("kind = ?")
        values.append(arguments.kind)
    where = " AND ".join(conditions)
    total = store.query(f"SELECT count(*) FROM {source} WHERE {where}", *values)[0][0]
    sql = f"SELECT {columns} FROM {source} WHERE {where} ORDER BY {order} LIMIT ?"
    rows = store.query_rows(sql, *values, arguments.limit or -1)
    return {f"{arguments.what}s: {len(rows)} of {total}": rows}


def show_rows(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
    """Return one item, what it rests on, and its history."""
    table = f"{arguments.what}s"
    found = store.query_rows(f"SELECT * FROM {table} WHERE id = ?", arguments.id)
    if not found:
        raise MemoryStoreError(f"{arguments.what}={arguments.id} is not in the store; `pmd memory list` shows the ids.")
    item = {key: value for key, value in found[0].items() if key != "embedding" and value not in (None, "")}
    tables = {f"{arguments.what} {arguments.id}": [{"field": key, "value": value} for key, value in item.items()]}
    if arguments.what == "task":
        for child, text in (("experiences", "response"), ("insights", "content")):
            sql = f"SELECT id, status, support, {text} AS text FROM {child} WHERE task_row = ? ORDER BY id"
            tables[child] = store.query_rows(sql, arguments.id)
        return tables
    level = LEVELS.index(arguments.what)
    if level > 0:
        parent, text = (("experiences", "response"), ("insights", "content"))[level - 1]
        tables[f"rests on {parent}"] = store.query_rows(
            f"SELECT parent.id, task_id, status, {text} AS text"
            f" FROM links JOIN {parent} parent ON parent.id = parent_id JOIN tasks t ON t.id = task_row"
            " WHERE child_level = ? AND child_id = ? ORDER BY parent.id",
            level,
            arguments.id,
        )
    if arguments.lineage:
        tables["lineage"] = memory_tools.lineage(store, level, arguments.id)
    tables["history"] = store.query_rows(
        "SELECT generation, action, reason, before, after FROM ops WHERE level = ? AND item_id = ? ORDER BY id",
        level,
        arguments.id,
    )
    return tables


def search_rows(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
    """Return what a teacher would be shown for a task, and the nearest training tasks."""
    config = MemoryConfig(k=arguments.k, levels=arguments.levels)
    index = TaskIndex.open(store)
    retriever = Retriever(store, index, config)
    tasks = {task.id: task for task in store.tasks()}
    hits = index.search(store.embedder.embed_queries([arguments.text]), config.neighbours)[0]
    items = sorted(retriever.retrieve(arguments.text, seed=0), key=lambda item: (-item.level, item.item_id))
    return {
        "a teacher would be shown": [
            {
                "level": item.level,
                "kind": item.kind,
                "id": item.item_id,
                "task_id": item.task_id or "",
                "similarity": item.similarity,
                "text": item.text,
            }
            for item in items
        ],
        "nearest training tasks": [
            {"id": row, "task_id": tasks[row].task_id, "similarity": similarity, "text": tasks[row].memory_key}
            for row, similarity in hits
        ],
    }


def print_rows(console: Console, title: str, rows: Rows) -> None:
    """Print rows as a table, without the columns that are empty."""
    if not rows:
        console.print(f"[bold]{title}[/bold]: none")  # titles are our own words
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = [column for column in rows[0] if any(row[column] not in (None, "") for row in rows)]
    for column in columns:
        number = all(isinstance(row[column], int | float) for row in rows)
        heading = column.replace("_", " ")  # wraps between words if the terminal is narrow
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    console.print(table)


def _cell(value: Any) -> Text:
    if isinstance(value, float):
        return Text(f"{value:.3f}")
    text = "" if value is None else str(value)
    return Text(printable(text if len(text) <= 400 else text[:400] + " ..."))

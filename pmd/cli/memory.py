"""`python -m pmd memory`: inspects, checks, exports and imports memory stores. Prints tables or JSON.

Only `rebuild`, `rollback`, `compact`, `forget` and `import` write; all other commands open the store read-only.
"""

import argparse
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pmd.cli import memory_tools
from pmd.cli.printable import printable, printable_json
from pmd.config.schema import MemoryConfig
from pmd.errors import MemoryStoreError
from pmd.memory.checksum import remedy
from pmd.memory.files import one_line
from pmd.memory.index import TaskIndex
from pmd.memory.retrieve import Retriever
from pmd.memory.store import MemoryStore
from pmd.types import INSIGHT_KINDS

Rows = list[dict[str, Any]]
STORE_IN_RUN = Path("memory") / "memory.sqlite"
#: Commands drop nothing that they are not asked to drop; the caps of the run apply at its next update.
UNBOUNDED = MemoryConfig(keep_generations=None, capacity=2**62)
WHAT = ("task", "experience", "insight", "behaviour")
STATUSES = ("active", "internalized", "retired", "quarantined", "all")
EPILOG = """\
The memory has three levels: experiences (attempts at one task), insights (what the attempts at one task teach:
strategies, lessons, contrasts) and behaviours (what insights of several tasks have in common).

examples:
  python -m pmd memory stats  runs/pmd                      what is in the memory of a run
  python -m pmd memory list   runs/pmd behaviour            the behaviours, best supported first
  python -m pmd memory list   runs/pmd insight --status quarantined
  python -m pmd memory show   runs/pmd behaviour 3          one item, its evidence and its history
  python -m pmd memory search runs/pmd "red 3 blue 5 green 1 gold 7 zib"    what a teacher would be shown
  python -m pmd memory diff   runs/pmd 3 5                  what changed from generation 3 to 5
  python -m pmd memory audit  runs/pmd                      what helps the teacher and what harms it
  python -m pmd memory compact runs/pmd --keep 5            drop older log rows and what was retired before
  python -m pmd memory forget runs/pmd TASK                 delete what was learnt from a task
  python -m pmd memory report runs/pmd --out memory.html    everything on one page
  python -m pmd memory export runs/pmd memory.jsonl         to read, to keep, or to import into another store
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m pmd memory`."""
    parser = argparse.ArgumentParser(
        prog="pmd memory",
        description="Inspect a memory store, given by its run directory or its file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("store", metavar="STORE", type=Path, help="a run directory or the store's .sqlite file")
    common.add_argument("--json", action="store_true", help="print JSON instead of a table")

    commands.add_parser("stats", parents=[common], help="count what the store holds")
    listing = commands.add_parser("list", parents=[common], help="list items of one level, best supported first")
    listing.add_argument("what", nargs="?", choices=WHAT, default="insight", help="default: insight")
    listing.add_argument("--kind", choices=INSIGHT_KINDS, help="insights of this kind only")
    listing.add_argument("--status", choices=STATUSES, help="default: active; tasks have none")
    listing.add_argument("--limit", type=_count, default=30, metavar="N", help="most rows shown; 0 is all; default 30")
    show = commands.add_parser("show", parents=[common], help="show one item, its evidence and its history")
    show.add_argument("what", choices=WHAT)
    show.add_argument("id", type=int)
    show.add_argument("--lineage", action="store_true", help="also everything it is based on or that is based on it")
    search = commands.add_parser("search", parents=[common], help="look up what a teacher would be shown")
    search.add_argument("text", help="the task, as its memory key (the statement without template words)")
    search.add_argument("-k", type=_items, default=MemoryConfig().k, help=f"items; default {MemoryConfig().k}")
    search.add_argument("--levels", type=int, nargs="+", choices=(0, 1, 2), default=MemoryConfig().levels)
    diff = commands.add_parser("diff", parents=[common], help="what changed from one generation to another")
    diff.add_argument("old", type=int, metavar="A")
    diff.add_argument("new", type=int, metavar="B")
    diff.add_argument("--all", action="store_true", help="also items that changed only in support")
    commands.add_parser("check", parents=[common], help="look for problems; exit code 1 if there are any")
    commands.add_parser("rebuild", parents=[common], help="rebuild the task index from the store")
    rollback = commands.add_parser(
        "rollback",
        parents=[common],
        help="restore an earlier generation as a new one; a resumed run still uses its checkpoint's memory",
    )
    rollback.add_argument("generation", type=int)
    compact = commands.add_parser(
        "compact", parents=[common], help="drop old log rows and items retired before them, and shrink the file"
    )
    keep = MemoryConfig().keep_generations
    compact.add_argument(
        "--keep", type=_items, default=keep, metavar="N", help=f"generations that stay comparable; default {keep}"
    )
    compact.add_argument("--archive", action="store_true", help="write what is dropped to files in archive/ first")
    forget = commands.add_parser(
        "forget",
        parents=[common],
        help="delete a task's attempts and insights; a resumed run still uses its checkpoint's memory",
    )
    forget.add_argument("task", metavar="TASK", help="the task's id, as `list STORE task` shows it")
    export = commands.add_parser("export", parents=[common], help="write tasks, insights, behaviours as JSON lines")
    export.add_argument("file", type=Path)
    export.add_argument("--experiences", action="store_true", help="level 0 too; it contains answers")
    report = commands.add_parser("report", parents=[common], help="write one static page to look at in a browser")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html next to the store")
    audit = commands.add_parser("audit", parents=[common], help="what audits found: usefulness by level, best, worst")
    audit.add_argument("--limit", type=_count, default=10, metavar="N", help="items at each end; default 10")
    import_ = commands.add_parser("import", parents=[common], help="add an export to a store")
    import_.add_argument("file", type=Path)
    import_.add_argument(
        "--config",
        action="append",
        type=Path,
        metavar="FILE",
        help="configuration whose held-out tasks are refused; default: that of the store's run; may be repeated",
    )
    import_.add_argument("--unchecked", action="store_true", help="compare with no held-out tasks")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one subcommand; return the exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "list":
        if arguments.kind and arguments.what != "insight":
            parser.error(f"--kind={arguments.kind} applies to insights only; leave it out for {arguments.what}")
        if arguments.status not in (None, "all") and arguments.what == "task":
            parser.error(f"--status={arguments.status}: tasks have no status; leave it out")
    console = Console()
    write = arguments.command in memory_tools.WRITING
    commands = {"stats": _stats, "list": _list, "show": _show, "search": _search, **memory_tools.COMMANDS}
    with MemoryStore.open(find_store(arguments.store), read_only=not write, config=UNBOUNDED) as store:
        try:
            tables = commands[arguments.command](store, arguments)
        except (sqlite3.DatabaseError, ValueError, RecursionError) as error:  # damage that only shows here
            raise MemoryStoreError(
                f"memory store={store.path} is damaged ({one_line(error)}); {remedy(store.path)}"
            ) from error
        except OSError as error:
            raise MemoryStoreError(
                f"{error.filename or store.path} cannot be used ({error.strerror}); check path, permissions and free "
                "disk space."
            ) from error
    if arguments.json:
        print(printable_json(json.dumps(tables, ensure_ascii=False, indent=1)))
    else:
        for title, rows in tables.items():
            _print(console, title, rows)
    return int(arguments.command == "check" and any(tables.values()))


def _count(text: str) -> int:
    """Parse a number of rows, 0 for all."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be a whole number from 0")
    return int(text)


def _items(text: str) -> int:
    """Parse a number of items to retrieve."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number from 1")
    return int(text)


def find_store(path: Path) -> Path:
    """Return the store's file for a run directory or the file itself.

    Raises:
        MemoryStoreError: there is none.
    """
    found = path / STORE_IN_RUN if path.is_dir() else path
    if not found.is_file():
        raise MemoryStoreError(f"memory store={found} does not exist; give a run directory or a store's .sqlite file.")
    return found


def _stats(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
    facts: dict[str, Any] = {"file": str(store.path), "megabytes": round(store.path.stat().st_size / 1e6, 2)}
    facts |= {"embedder": store.meta("embedder"), "schema version": store.query("PRAGMA user_version")[0][0]}
    facts |= store.stats()
    return {"memory": [{"quantity": key, "value": value} for key, value in facts.items()]}


def _list(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
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


def _show(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
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
    level = WHAT.index(arguments.what) - 1
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


def _search(store: MemoryStore, arguments: argparse.Namespace) -> dict[str, Rows]:
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


def _print(console: Console, title: str, rows: Rows) -> None:
    if not rows:
        console.print(f"[bold]{title}[/bold]: none")  # titles are our own words
        return
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", expand=False)
    for column in rows[0]:
        number = all(isinstance(row[column], int | float) for row in rows)
        heading = column.replace("_", " ")  # wraps between words if the terminal is narrow
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def _cell(value: Any) -> Text:
    if isinstance(value, float):
        return Text(f"{value:.3f}")
    text = "" if value is None else str(value)
    return Text(printable(text if len(text) <= 400 else text[:400] + " ..."))

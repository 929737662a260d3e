"""`python -m pmd memory`: inspects, checks, exports and imports memory stores. Prints tables or JSON.

Only `rebuild`, `rollback`, `compact`, `forget` and `import` write; all other commands open the store read-only.
"""

import argparse
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from pmd.cli.printable import printable_json
from pmd.config.schema import MemoryConfig
from pmd.errors import MemoryStoreError
from pmd.types import INSIGHT_KINDS

STORE_IN_RUN = Path("memory") / "memory.sqlite"
#: Commands drop nothing that they are not asked to drop; the caps of the run apply at its next update.
UNBOUNDED = MemoryConfig(keep_generations=None, capacity=2**62)
WHAT = ("task", "experience", "insight", "behaviour")
STATUSES = ("active", "internalized", "retired", "quarantined", "all")
DESCRIPTION = """\
Inspect a memory store, given by its run directory or its file.

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

The memory has three levels: experiences (attempts at one task), insights (what the attempts at one task teach:
strategies, lessons, contrasts) and behaviours (what insights of several tasks have in common)."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m pmd memory`."""
    parser = argparse.ArgumentParser(
        prog="python -m pmd memory",
        description=DESCRIPTION,
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
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from pmd.cli import memory_tools, memory_views
    from pmd.memory.checksum import remedy
    from pmd.memory.files import one_line
    from pmd.memory.store import MemoryStore

    write = arguments.command in memory_tools.WRITING
    commands = {
        "stats": memory_views.stats_rows,
        "list": memory_views.list_rows,
        "show": memory_views.show_rows,
        "search": memory_views.search_rows,
        **memory_tools.COMMANDS,
    }
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
            memory_views.print_rows(Console(), title, rows)
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

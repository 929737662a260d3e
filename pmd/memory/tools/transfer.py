"""Exports a memory as JSON lines, and imports it into a store of another run, model or embedder.

The file has a header, then tasks, insights and behaviours. Experiences (level 0) contain answers and are left out
unless requested. Items refer to each other by the ids of the exporting store, and get new ids on import. Vectors are
left out, because the importing store uses its own embedder. Files of format version 1 can still be imported.
"""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pmd.errors import MemoryStoreError
from pmd.memory.content import known_columns, row_problem
from pmd.memory.held_out import HeldOut
from pmd.memory.store import LIVE, TABLES, MemoryStore
from pmd.memory.update import Writer, open_writer
from pmd.tasks.lines import describe_unusable
from pmd.types import INSIGHT_KINDS

FORMAT = "pmd-memory"
VERSION = 2
_OWN_COLUMNS = {"id", "embedding", "generation", "last_generation", "previous_id"}  # belong to a store, not to an item
#: Fields of format version 1 that no longer exist.
_REMOVED = {"title", "applies_when", "not_when", "pitfalls", "model", "prompt_version", "polarity"}
Line = dict[str, Any]


def export_lines(store: MemoryStore, *, experiences: bool = False) -> Iterator[Line]:
    """Yield the header and all tasks and live items, parents before children."""
    yield {
        "format": FORMAT,
        "version": VERSION,
        "embedder": store.embedder.name,
        "generation": store.generation,
        "experiences": experiences,
    }
    for row in store.query_rows("SELECT * FROM tasks ORDER BY id"):
        yield {"type": "task", "id": row["id"], **{k: v for k, v in row.items() if k not in _OWN_COLUMNS}}
    for level in (0, 1, 2) if experiences else (1, 2):
        for row in store.query_rows(f"SELECT * FROM {TABLES[level]} WHERE {LIVE} ORDER BY id"):
            parents = store.query(
                "SELECT parent_id FROM links WHERE child_level = ? AND child_id = ? ORDER BY 1", level, row["id"]
            )
            item = {k: v for k, v in row.items() if k not in _OWN_COLUMNS}
            yield {"type": TABLES[level], "id": row["id"], "parents": [p for (p,) in parents], **item}


def export_file(store: MemoryStore, path: Path, *, experiences: bool = False) -> int:
    """Write the export, complete or not at all; return how many lines follow the header."""
    partial = path.with_name(path.name + ".partial")
    count = -1
    try:
        with partial.open("w", encoding="utf-8") as file:
            for line in export_lines(store, experiences=experiences):
                file.write(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n")
                count += 1
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return count


def import_file(
    store: MemoryStore, path: Path, excluded: frozenset[str] = frozenset(), held_out: HeldOut | None = None
) -> dict[str, int]:
    """Add an export to a store, all or nothing; return how many of each type are new.

    A task or behaviour already in the store stays unchanged; an insight with the same task, kind and text gains
    support.

    Args:
        excluded: ids of training tasks that must not be remembered; they and what rests on them are left out.
        held_out: the held-out tasks of the run; None compares with none.

    Raises:
        MemoryStoreError: a line is malformed (with its number), or a task is held out or differs from the stored one.
    """
    if not path.is_file():
        raise MemoryStoreError(f"{path} is not a file; give one that `pmd memory export` wrote.")
    try:
        opened = path.open(encoding="utf-8", errors="surrogateescape")  # the line with the bad byte is then named
    except OSError as error:
        raise MemoryStoreError(
            f"{path} cannot be read ({error.strerror}); give a file that `pmd memory export` wrote."
        ) from error
    with opened as file, open_writer(store) as writer:
        lines = enumerate(file, start=1)
        version = _read_version(path, next(lines, (1, ""))[1])
        reading = _Import(writer, path, excluded, held_out)
        for number, text in lines:
            try:
                line = _checked(path, number, json.loads(text))
                reading.add(number, line if version == VERSION else _from_version_1(line))
            except _BAD_LINE as error:
                raise MemoryStoreError(
                    f"{path}:{number} is not a line of a {FORMAT} export ({error!r}); nothing was imported. "
                    "Export again."
                ) from error
        reading.refuse_held_out()
    return reading.counts


#: What a malformed value raises, in Python or when SQLite is given it.
_BAD_LINE = (
    ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, sqlite3.InterfaceError,
    sqlite3.ProgrammingError, sqlite3.IntegrityError, sqlite3.DataError,
)  # fmt: skip


class _Import:
    """The lines imported so far."""

    def __init__(self, writer: Writer, path: Path, excluded: frozenset[str], held_out: HeldOut | None):
        self.writer, self.path, self.excluded, self.held_out = writer, path, excluded, held_out
        self.counts = {"task": 0, **dict.fromkeys(TABLES.values(), 0)}
        self.ids: dict[tuple[str, int], int] = {}  # (type, id in the file) -> id in the store
        self.left_out: set[tuple[str, int]] = set()
        self.refused: list[str] = []  # a sentence for each line that comes from a held-out task

    def add(self, number: int, line: Line) -> None:
        """Import one line, unless it is left out or comes from a held-out task."""
        kind, old_id = line.pop("type"), line.pop("id")
        if kind not in self.counts or type(old_id) is not int or (kind, old_id) in self.ids:
            raise ValueError(f"type={kind!r}, id={old_id!r}")
        reason = self._describe_held_out(kind, line)
        if reason:
            self.refused.append(f"line {number}: {reason}")
        if reason or line.get("task_id") in self.excluded or self._rests_on_left_out(kind, line):
            self.left_out.add((kind, old_id))
            return
        if kind == "task":
            self.ids[kind, old_id], new = _import_task(self.writer, line)
        else:
            self.ids[kind, old_id], new = _import_item(self.writer, kind, line, self.ids)
        _check_row(self.writer, "tasks" if kind == "task" else kind, self.ids[kind, old_id])
        self.counts[kind] += new

    def refuse_held_out(self) -> None:
        """Raise if any line came from a held-out task."""
        if self.refused:
            more = f", and {len(self.refused) - 3} more" if len(self.refused) > 3 else ""
            raise MemoryStoreError(
                f"{self.path} holds what is held out here: {'; '.join(self.refused[:3])}{more}. Nothing was imported. "
                "Export from a run with the same training tasks, or remove these lines and what rests on them."
            )

    def _describe_held_out(self, kind: str, line: Line) -> str:
        if self.held_out is None:
            return ""
        if kind == "task":
            if line["task_id"] in self.excluded:
                return ""
            return self.held_out.describe_task(line["task_id"], line["question"], line["memory_key"])
        return self.held_out.describe_text(line["response" if kind == "experiences" else "content"])

    def _rests_on_left_out(self, kind: str, line: Line) -> bool:
        parent_kind = {"insights": "experiences", "behaviours": "insights"}.get(kind, "")
        rests_on = [("task", line.get("task_row")), *((parent_kind, parent) for parent in line.get("parents", ()))]
        return any(parent in self.left_out for parent in rests_on)


def _read_version(path: Path, text: str) -> int:
    """Return the format version that the header names, or refuse the file."""
    try:
        header = json.loads(text)
        found = header["format"], header["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None, None
    if found[0] != FORMAT or type(found[1]) is not int or found[1] not in (1, VERSION):
        raise MemoryStoreError(
            f"{path}:1 has format={str(found[0])[:60]}, version={str(found[1])[:60]}; must be {FORMAT}, 1 or "
            f"{VERSION}. Give a file that `pmd memory export` wrote."
        )
    return found[1]


def _checked(path: Path, number: int, line: Line) -> Line:
    """Return the line if all of it can be stored and encoded."""
    if problem := describe_unusable(line):
        raise MemoryStoreError(f"{path}:{number}: {problem}; nothing was imported.")
    return line


def _from_version_1(line: Line) -> Line:
    """Convert a line of format version 1 to the current names."""
    line = {key: value for key, value in line.items() if key not in _REMOVED}
    if line["type"] == "problem":
        line["type"] = "task"
    if line["type"] == "behaviours":
        line.pop("leak", None)
    if "problem_id" in line:
        line["task_row"] = line.pop("problem_id")
    status = line.get("status")
    if status in ("absorbed", "shadow"):
        line["status"] = {"absorbed": "internalized", "shadow": "active"}[status]
    return line


def _import_task(writer: Writer, line: Line) -> tuple[int, bool]:
    if line["split"] != "train":
        raise MemoryStoreError(f"task_id={line['task_id']} has split={line['split']}; memory keeps train only.")
    known = writer.ledger.db.execute(
        "SELECT id, content_sha FROM tasks WHERE task_id = ?", (line["task_id"],)
    ).fetchone()
    if known is None:
        _check_fields("tasks", line)
        return writer.ledger.insert("tasks", line | {"generation": writer.ledger.generation}), True
    if known[1] != line["content_sha"]:
        raise MemoryStoreError(
            f"task_id={line['task_id']} has another text or answer than the task stored under that id; "
            "import into a store of the same data, or into a new one."
        )
    return known[0], False


def _import_item(writer: Writer, table: str, line: Line, ids: dict[tuple[str, int], int]) -> tuple[int, bool]:
    level = {name: level for level, name in TABLES.items()}[table]
    parent_table = TABLES.get(level - 1, "")
    # Experiences may be missing from the export: insights based on them keep their support, but lose these links.
    parents = [ids[parent_table, parent] for parent in line.pop("parents") if (parent_table, parent) in ids]
    if level < 2:
        line["task_row"] = ids["task", line["task_row"]]
    _check_fields(table, line)
    if level == 1 and line["kind"] not in INSIGHT_KINDS:
        raise ValueError(f"kind={line['kind']!r} must be one of {', '.join(INSIGHT_KINDS)}")
    if level == 1 and (leak := writer.leak_of(line["task_row"], line["content"])):
        line |= {"leak": leak, "status": "quarantined"}
    elif line["status"] == "internalized":
        line["status"] = "active"  # internalized by another policy, not yet by this one
    same = {0: ("task_row", "correct", "signature"), 1: ("task_row", "kind", "content"), 2: ("content",)}
    known = writer.ledger.db.execute(
        f"SELECT id, support FROM {table} WHERE {' AND '.join(f'{column} = ?' for column in same[level])}"
        + (f" AND {LIVE}" if level == 2 else ""),
        tuple(line[column] for column in same[level]),
    ).fetchone()
    if known is not None:
        if level < 2:  # a behaviour's support counts tasks, and these are already counted
            writer.ledger.change(level, known[0], {"support": known[1] + line["support"]}, "import")
        return known[0], False
    return writer.ledger.add(level, line, "import", parents), True


def _check_fields(table: str, line: Line) -> None:
    """Refuse fields that are not columns of the table, whose names become part of SQL statements, or of other types."""
    columns = known_columns(table)
    for name, value in line.items():
        if name not in columns or name in _OWN_COLUMNS:
            raise KeyError(f"unknown field {name}")
        if not isinstance(value, columns[name]) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r:.60}")


def _check_row(writer: Writer, table: str, row_id: int) -> None:
    """Refuse a value outside the range of its column."""
    store = writer.store
    problem = row_problem(store.db, table, row_id, store.embedder.dimension, writer.ledger.generation, embedded=False)
    if problem:
        raise ValueError(problem)

"""Exports a memory as JSON lines, and imports it into a store of another run, model or embedder.

The file has a header, then tasks, insights and behaviours. Experiences (level 0) contain answers and are left out
unless requested. Items refer to each other by the ids of the exporting store, and get new ids on import. Vectors are
left out, because the importing store uses its own embedder. Files of format version 1 can still be imported.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pmd.errors import MemoryStoreError
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
    """Write the export; return how many lines follow the header."""
    partial = path.with_name(path.name + ".partial")
    count = -1
    with partial.open("w", encoding="utf-8") as file:
        for line in export_lines(store, experiences=experiences):
            file.write(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n")
            count += 1
    partial.replace(path)
    return count


def import_file(store: MemoryStore, path: Path, excluded: frozenset[str] = frozenset()) -> dict[str, int]:
    """Add an export to a store, all or nothing; return how many of each type are new.

    A task or behaviour already in the store stays unchanged; an insight with the same task, kind and text gains
    support.

    Args:
        excluded: ids of tasks that must not be remembered; they and their items are left out.

    Raises:
        MemoryStoreError: a line is malformed (with its number), or a task is held out or differs from the stored one.
    """
    counts = {"task": 0, **dict.fromkeys(TABLES.values(), 0)}
    ids: dict[tuple[str, int], int] = {}
    left_out: set[tuple[str, int]] = set()
    try:
        opened = path.open(encoding="utf-8", errors="surrogateescape")  # bytes that are not UTF-8 are found below
    except OSError as error:
        raise MemoryStoreError(
            f"{path} cannot be read ({error.strerror}); give a file that `pmd memory export` wrote."
        ) from error
    with opened as file, open_writer(store) as writer:
        lines = enumerate(file, start=1)
        version = _read_version(path, next(lines, (1, ""))[1])
        for number, text in lines:
            try:
                line = _checked(path, number, json.loads(text))
                line = line if version == VERSION else _from_version_1(line)
                kind, old_id = line.pop("type"), line.pop("id")
                if line.get("task_id") in excluded or ("task", line.get("task_row")) in left_out:
                    left_out.add((kind, old_id))
                    continue
                if kind == "task":
                    ids[kind, old_id], new = _import_task(writer, line)
                else:
                    ids[kind, old_id], new = _import_item(writer, kind, line, ids)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise MemoryStoreError(
                    f"{path}:{number} is not a line of a {FORMAT} export ({error!r}); nothing was imported. "
                    "Export again."
                ) from error
            counts[kind] += new
    return counts


def _read_version(path: Path, text: str) -> int:
    """Return the format version that the header names, or refuse the file."""
    try:
        header = json.loads(text)
        found = header["format"], header["version"]
    except (ValueError, KeyError, TypeError):
        found = None, None
    if found[0] != FORMAT or found[1] not in (1, VERSION):
        raise MemoryStoreError(
            f"{path}:1 has format={found[0]}, version={found[1]}; must be {FORMAT}, 1 or {VERSION}. "
            "Give a file that `pmd memory export` wrote."
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
    if line.get("status") == "absorbed":
        line["status"] = "internalized"
    return line


def _import_task(writer: Writer, line: Line) -> tuple[int, bool]:
    if line["split"] != "train":
        raise MemoryStoreError(f"task_id={line['task_id']} has split={line['split']}; memory keeps train only.")
    known = writer.ledger.db.execute(
        "SELECT id, content_sha FROM tasks WHERE task_id = ?", (line["task_id"],)
    ).fetchone()
    if known is None:
        return writer.ledger.insert("tasks", _known_columns(writer, "tasks", line)), True
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
    return writer.ledger.add(level, _known_columns(writer, table, line), "import", parents), True


def _known_columns(writer: Writer, table: str, line: Line) -> Line:
    """Refuse fields that are not columns of the table, because the names become part of an SQL statement."""
    columns: Iterable[tuple] = writer.ledger.db.execute(f"PRAGMA table_info({table})")
    allowed = {column[1] for column in columns} - _OWN_COLUMNS
    unknown = sorted(set(line) - allowed)
    if unknown:
        raise KeyError(f"unknown field {unknown[0]}")
    return line | ({"generation": writer.ledger.generation} if table == "tasks" else {})

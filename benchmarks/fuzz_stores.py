"""Damages memory stores, exports and indexes in seeded ways and runs `pmd memory` on them: no traceback, no hang.

  python benchmarks/fuzz_stores.py --cases 2000 --seed 0

Each case runs two or three commands in this process. A case fails if a command raises, takes longer than --limit
seconds, ends with a code other than 0, 1 or 2, says anything but one sentence when it fails, or prints a control
character; and if damage under a checksum, or a foreign value, is accepted. Failing cases are printed with their seed.
"""

import argparse
import contextlib
import hashlib
import io
import json
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "memory"))

from memory_world import World

from pmd.cli import main as pmd
from pmd.memory.index import TaskIndex
from pmd.memory.store import MemoryStore

READING = (
    ("stats",), ("list", "experience", "--status", "all"), ("list", "insight", "--status", "all"), ("list", "task"),
    ("list", "behaviour", "--status", "all"), ("show", "insight", "1", "--lineage"), ("show", "task", "1"),
    ("show", "behaviour", "1"), ("search", "red 3 zib"), ("diff", "1", "2", "--all"), ("diff", "2", "0"), ("audit",),
    ("check",), ("export", "out.jsonl", "--experiences"), ("report", "--out", "out.html"), ("stats", "--json"),
    ("show", "insight", "2", "--json"), ("list", "insight", "--json", "--limit", "0"),
)  # fmt: skip
WRITING = (("rebuild",), ("rollback", "1"), ("import", "given.jsonl"), ("compact", "--keep", "1"))
TABLES = ("tasks", "experiences", "insights", "behaviours", "links", "retrievals", "audits", "ops", "meta")
HOSTILE: tuple[object, ...] = (
    "<script>alert(1)</script>", "\x1b]0;owned\x07\x1b[31m", "\x9b31m", "[red]x[/red][/]", "", "a" * 5_000,
    "\u202eevil",
    "'; DROP TABLE ops; --", "{}", "[]", '{"status": 1}', '{"x = 1; --": 2}', "[" * 3000, "1e999", "NaN", "{", "\x00",
    -1, 0, 1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 10**12, 1.5, float("inf"), -1e300, None, b"\xff\xfe", b"",
    "retired", "lesson", "internalized", "spell", "999999999999", "1 ", "\u0966", "é" * 100,
)  # fmt: skip
JSON_VALUES = (*(v for v in HOSTILE if not isinstance(v, bytes)), [], {}, [[]], True, "\ud800", 10**30, ["a"], {"a": 1})


class Sound:
    """A store of three epochs with audits, and its export, to be copied and damaged."""

    def __init__(self, folder: Path):
        world = World(families=4)
        self.folder = folder
        with MemoryStore.open(folder / "m.sqlite", embedder=world.embedder()) as store:
            for epoch in range(3):
                world.write_epoch(store, epoch)
            _audit(store)
            TaskIndex.open(store)
        _run(["memory", "export", str(folder / "m.sqlite"), str(folder / "given.jsonl"), "--experiences"])
        self.lines = (folder / "given.jsonl").read_text(encoding="utf-8").splitlines()


def _audit(store: MemoryStore) -> None:
    from pmd.memory.judge import ItemAudit
    from pmd.memory.update import open_writer
    from pmd.types import MemoryItem

    one, two, *_ = store.insights()
    items = [MemoryItem(i.id, 1, "lesson", i.text, i.task_row, i.task_id, 0.5, 0.5) for i in (one, two)]
    with open_writer(store) as writer:
        writer.log_retrievals(1, "g", items)
        for group in "abc":
            writer.audit(
                [
                    ItemAudit(0, group, 1, one.id, 1, 1, -0.5, 0.2, None, None, None),
                    ItemAudit(0, group, 1, two.id, 1, 1, 0.5, -0.2, None, None, 0.0),
                ]
            )


def damage_bytes(draw: random.Random, store: Path) -> str:
    """Flip, cut, blank, move or insert bytes of the file, its checksum kept; the damage must be found."""
    data = bytearray(store.read_bytes())
    kind = draw.choice(("flip", "flips", "cut", "blank", "swap", "insert", "noise"))
    at, size = draw.randrange(len(data)), draw.randrange(1, 5000)
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "flips":
        for _ in range(40):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "blank":
        data[at : at + size] = b"\xa5" * len(data[at : at + size])
    elif kind == "swap":
        data = data[at:] + data[:at]
    elif kind == "insert":
        data[at:at] = draw.randbytes(size)
    else:
        data[at : at + size] = draw.randbytes(len(data[at : at + size]))
    changed = bytes(data) != store.read_bytes()
    store.write_bytes(data)
    return "found" if changed else "any"


def damage_without_checksum(draw: random.Random, store: Path) -> str:
    """The same without a checksum: no promise that it is found, but no command may break."""
    damage_bytes(draw, store)
    store.with_name("m.sqlite.sum").unlink()
    return "any"


def foreign_value(draw: random.Random, store: Path) -> str:
    """Put a hostile value into a column, with constraints switched off and a checksum that fits."""
    db = sqlite3.connect(store, isolation_level=None)
    db.execute("PRAGMA ignore_check_constraints=ON")
    table = draw.choice(TABLES)
    columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    for _ in range(draw.choice((1, 1, 3))):
        column, value = draw.choice(columns), draw.choice(HOSTILE)
        where = draw.choice(("TRUE", f"{columns[0]} = (SELECT min({columns[0]}) FROM {table})"))
        with contextlib.suppress(sqlite3.Error, OverflowError):
            db.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", (value,))
    _close_and_sum(db, draw, store)
    return "any"


def foreign_schema(draw: random.Random, store: Path) -> str:
    """Add, drop or rename tables and columns, add triggers and views."""
    db = sqlite3.connect(store, isolation_level=None)
    table = draw.choice(TABLES)
    columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    statement = draw.choice(
        (
            f"DROP TABLE {table}",
            f"ALTER TABLE {table} RENAME TO other",
            f"ALTER TABLE {table} ADD COLUMN extra TEXT",
            f"ALTER TABLE {table} RENAME COLUMN {draw.choice(columns)} TO other",
            f"ALTER TABLE {table} DROP COLUMN {draw.choice(columns)}",
            "CREATE TRIGGER t AFTER INSERT ON ops BEGIN DELETE FROM insights; END",
            "CREATE VIEW v AS SELECT * FROM ops",
            "CREATE TABLE another (x)",
            f"DELETE FROM {table}",
            f"PRAGMA user_version={draw.choice((0, 1, 2, 4, 99, -1))}",
            "PRAGMA application_id=1",
        )
    )
    changed = False
    with contextlib.suppress(sqlite3.Error):
        db.execute(statement)
        changed = not statement.startswith("DELETE")
    _close_and_sum(db, draw, store)
    return "refused" if changed else "any"


def _close_and_sum(db: sqlite3.Connection, draw: random.Random, store: Path) -> None:
    generation = 0
    with contextlib.suppress(sqlite3.Error, ValueError, TypeError):
        generation = int(db.execute("SELECT value FROM meta WHERE key = 'generation'").fetchone()[0])
    db.close()
    sums = store.with_name("m.sqlite.sum")
    if draw.random() < 0.5:
        sums.unlink()
    else:
        sums.write_text(
            json.dumps({"generation": generation, "sha256": hashlib.sha256(store.read_bytes()).hexdigest()})
        )


def foreign_import(draw: random.Random, store: Path, lines: list[str]) -> str:
    """Change lines of an export: values, fields, order, bytes."""
    lines = list(lines)
    kind = draw.choice(("value", "value", "value", "drop", "double", "shuffle", "bytes", "field", "text"))
    at = draw.randrange(len(lines))
    if kind == "value":
        line = json.loads(lines[at])
        for _ in range(draw.choice((1, 1, 2))):
            line[draw.choice(list(line))] = draw.choice(JSON_VALUES)
        lines[at] = json.dumps(line)
    elif kind == "field":
        line = json.loads(lines[at])
        line.pop(draw.choice(list(line)))
        line |= draw.choice(({}, {"id) VALUES (1); --": 1}, {"embedding": "x"}, {"generation": 3}))
        lines[at] = json.dumps(line)
    elif kind == "drop":
        del lines[at]
    elif kind == "double":
        lines.insert(draw.randrange(len(lines)), lines[at])
    elif kind == "shuffle":
        draw.shuffle(lines)
    elif kind == "text":
        lines[at] = draw.choice(("", "{", "[" * 100_000, '{"a":' * 5000, "null", "1", "\x00", "9" * 10_000, '"x"'))
    data = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    if kind == "bytes":
        for _ in range(draw.choice((1, 3, 50))):
            data[draw.randrange(len(data))] = draw.randrange(256)
    store.with_name("given.jsonl").write_bytes(data)
    return "any"


def damage_index(draw: random.Random, store: Path) -> str:
    """Damage the graph or its manifest."""
    path = store.with_name(draw.choice(("tasks.hnsw", "tasks.json")))
    data = bytearray(path.read_bytes())
    kind = draw.choice(("flip", "cut", "empty", "folder", "json", "deep", "forged"))
    if kind == "flip":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[draw.randrange(len(data)) :]
    elif kind == "empty":
        data.clear()
    elif kind == "json":
        data = bytearray(json.dumps(draw.choice(JSON_VALUES)).encode())
    elif kind == "deep":
        data = bytearray(b"[" * 100_000)
    path.write_bytes(data)
    if kind == "folder":
        path.unlink()
        path.mkdir()
    if kind == "forged":  # a damaged graph whose manifest fits
        graph = bytearray(store.with_name("tasks.hnsw").read_bytes())
        for _ in range(8):
            graph[draw.randrange(min(96, len(graph)))] ^= 1 << draw.randrange(8)
        store.with_name("tasks.hnsw").write_bytes(graph)
        manifest = json.loads(store.with_name("tasks.json").read_text())
        manifest["sha256"] = hashlib.sha256(graph).hexdigest()
        store.with_name("tasks.json").write_text(json.dumps(manifest))
    return "any"


def damage_beside(draw: random.Random, store: Path) -> str:
    """Damage the checksum, or leave odd files beside the store."""
    name = draw.choice(("m.sqlite.sum", "m.sqlite.writing", "m.sqlite-wal", "m.sqlite.partial", "m.sqlite.sum.partial"))
    path = store.with_name(name)
    choice = draw.randrange(5)
    if choice == 0 and path.exists() and path.stat().st_size:
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    elif choice == 1:
        path.write_bytes(draw.randbytes(draw.randrange(0, 9000)))
    elif choice == 2:
        path.write_text(draw.choice(("4", "5", "6", "-1", "x", '{"generation": 5, "sha256": null}', "[" * 100_000)))
    elif choice == 3:
        path.unlink(missing_ok=True)
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    return "any"


class TooSlow(BaseException):
    """A command exceeded the limit."""


def _alarm(number: int, frame: object) -> None:
    raise TooSlow


def _run(arguments: list[str]) -> tuple[int, str, str]:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = pmd(arguments)
    return code, out.getvalue(), error.getvalue()


def problem_of(command: tuple[str, ...], store: Path, limit: int, expected: str) -> str:
    """Run one command; return what is wrong with how it ended, empty if nothing is."""
    signal.alarm(limit)
    try:
        code, out, error = _run(["memory", command[0], str(store), *command[1:]])
    except TooSlow:
        return f"longer than {limit} s"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if expected == "found" and not (code == 1 and "damaged" in error):
        return f"the damage was not found: exit code {code}, {error[:200]}"
    if expected == "refused" and code == 0:
        return "the foreign store was accepted"
    if code and command[0] != "check" and (error.count("\n") != 1 or "Error: " not in error):
        return f"exit code {code} with: {error[:300]!r}"
    if set(out + error) & {chr(n) for n in (*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x202E)}:
        return "a control character was printed"
    page = Path("out.html")
    if page.exists() and "<script" in page.read_text(encoding="utf-8"):
        return "a script reached the page"
    return ""


def run_case(seed: str, kind: Callable[..., str], sound: Sound, folder: Path, limit: int) -> list[str]:
    """Run one case in a folder of its own; return what went wrong."""
    draw = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound.folder, folder)
    store = folder / "m.sqlite"
    with contextlib.chdir(folder):
        arguments = (draw, store, sound.lines) if kind is foreign_import else (draw, store)
        expected = kind(*arguments)
        commands = [draw.choice(READING), draw.choice(WRITING)]
        if kind is foreign_import:
            commands = [("import", "given.jsonl"), ("report", "--out", "out.html"), draw.choice(READING)]
        wrong = []
        for command in commands:
            problem = problem_of(command, store, limit, expected)
            if problem:
                wrong.append(f"{seed} {' '.join(command)}: {problem}")
        return wrong


KINDS: tuple[Callable[..., str], ...] = (
    damage_bytes, damage_without_checksum, foreign_value, foreign_value, foreign_schema, foreign_import, foreign_import,
    damage_index, damage_beside,
)  # fmt: skip


def main() -> int:
    """Run the cases; print counts by kind and every failure; return 1 if there was one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=60, help="seconds for one command")
    parser.add_argument("--only", help="run this one case, as printed: SEED/NUMBER")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _alarm)
    counts: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "sound").mkdir()
        sound = Sound(Path(name) / "sound")
        numbers = [int(options.only.split("/")[1])] if options.only else range(options.cases)
        for number in numbers:
            kind = KINDS[number % len(KINDS)]
            found = run_case(f"{options.seed}/{number}", kind, sound, Path(name) / "case", options.limit)
            counts[kind.__name__] += 1
            failures += found
            for failure in found:
                print(failure, flush=True)
    print(f"seed {options.seed}: {counts.total()} cases, {len(failures)} failures")
    print(", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())

"""Checks that a store holds what its schema promises: tables, types and ranges. SQLite does not enforce them.

A store may come from a stranger. Its rows are shown in terminals and pages, become part of prompts and of sums, and its
numbers become lengths of lists, so each value is checked once, when the store is opened.
"""

import json
import re
import sqlite3
from functools import cache
from importlib import resources

from pmd.errors import MemoryStoreError
from pmd.memory.embed import Embedder
from pmd.types import INSIGHT_KINDS

MAX_TEXT = 10_000_000  # bytes; the longest of our own are prompts and attempts
MAX_GENERATION = 1_000_000
MAX_NUMBER = 2**53  # the largest whole number up to which floats are exact
MAX_DIMENSION = 65_536
MAX_WORD_TABLE = 10_000_000
SIMILARITIES = {"cluster_similarity", "merge_similarity"}  # thresholds that the latest update used
META = {"dimension", "embedder", "embedder_state", "generation", "generation_check", "history_from"} | SIMILARITIES
_STATUSES = "('active', 'internalized', 'retired', 'quarantined')"
_KINDS = "(" + ", ".join(f"'{kind}'" for kind in INSIGHT_KINDS) + ")"
_JSON_OBJECT = "({0} IS NULL OR (substr({0}, 1, 1) = '{{' AND json_valid({0})))"
#: What must hold for the values of a column, besides its type; columns of other tables with the same name included.
_RANGES = {
    "id": f"id BETWEEN 1 AND {MAX_NUMBER}",
    "split": "split = 'train'",
    "kind": f"kind IN {_KINDS}",
    "status": f"status IN {_STATUSES}",
    "action": "action IN ('add', 'change', 'delete')",
    "correct": "correct IN (0, 1)",
    "included": "included IN (0, 1)",
    "level": "level IN (0, 1, 2)",
    "num_successes": "num_successes BETWEEN 0 AND num_attempts",
    "num_attempts": f"num_attempts BETWEEN 0 AND {MAX_NUMBER}",
    "support": f"support BETWEEN 0 AND {MAX_NUMBER}",
    "version": f"version BETWEEN 1 AND {MAX_NUMBER}",
    "generation": "generation BETWEEN 0 AND :generation",
    "last_generation": "last_generation BETWEEN generation AND :generation",
    "policy_version": f"policy_version BETWEEN 0 AND {MAX_NUMBER}",
    "last_policy_version": f"last_policy_version BETWEEN 0 AND {MAX_NUMBER}",
    "embedding": "(embedding IS NULL OR length(embedding) = :bytes)",
    "before": _JSON_OBJECT.format("before") + " AND (before IS NULL) = (action = 'add')",
    "after": _JSON_OBJECT.format("after"),
}


def check_content(db: sqlite3.Connection, embedder: Embedder, generation: int) -> None:
    """Refuse a store whose tables or values are not those of the schema.

    Raises:
        MemoryStoreError: the first thing that is wrong, without the path.
    """
    problem = _meta_problem(db, generation) or _schema_problem(db)
    if problem:
        raise MemoryStoreError(problem)
    for table in _columns():
        row = db.execute(
            f"SELECT {_key(table)} FROM {table} WHERE NOT ({_right(table)}) LIMIT 1",
            {"generation": generation, "bytes": 4 * embedder.dimension},
        ).fetchone()
        if row is not None:
            raise MemoryStoreError(row_problem(db, table, row[0], embedder.dimension, generation))


def row_problem(
    db: sqlite3.Connection, table: str, row_id: int | str, dimension: int, generation: int, *, embedded: bool = True
) -> str:
    """Return which column of a row is wrong, empty if none is; `embedded=False` leaves out the vector."""
    values = {"generation": generation, "bytes": 4 * dimension, "row": row_id}
    for name, condition in _conditions(table).items():
        if name == "embedding" and not embedded:
            continue
        sql = f"SELECT substr({name}, 1, 60) FROM {table} WHERE {_key(table)} = :row AND NOT ({condition})"
        found = db.execute(sql, values).fetchone()
        if found is not None:
            return f"row {row_id} of table {table} has {name}={found[0]!r}, which no store of pmd holds"
    return ""


def _meta_problem(db: sqlite3.Connection, generation: int) -> str:
    keys = {str(key) for (key,) in db.execute("SELECT key FROM meta")}
    since = db.execute("SELECT value FROM meta WHERE key = 'history_from'").fetchone()
    if keys - META:
        return f"its table meta has the key {min(keys - META)[:60]!r}, which no store of pmd has"
    if generation > MAX_GENERATION:
        return f"its generation={generation} exceeds {MAX_GENERATION}"
    if since is not None and not (str(since[0]).isdecimal() and len(since[0]) < 9 and int(since[0]) <= generation):
        return f"its history begins at {str(since[0])[:60]!r}, which is no generation up to {generation}"
    for key, value in db.execute("SELECT key, value FROM meta WHERE key LIKE '%_similarity'"):
        if not re.fullmatch(r"-?[01](\.\d{1,17})?", str(value)):
            return f"its {key}={str(value)[:60]!r} is no cosine similarity"
    return ""


def _schema_problem(db: sqlite3.Connection) -> str:
    """Refuse views, triggers and tables other than ours: they could run SQL of their own, or show what is not there."""
    found = {(kind, name) for kind, name in db.execute(_OBJECTS)}
    extra = sorted(found - _objects())
    if extra:
        return f"it has a {extra[0][0]} {str(extra[0][1])[:60]!r}, which no store of pmd has"
    for table, columns in _columns().items():
        if _table_info(db, table) != columns:
            return f"its table {table} has not the columns of a store of pmd"
    return ""


_OBJECTS = (
    "SELECT type, name FROM sqlite_master WHERE type != 'index' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY 2"
)


@cache
def _blank() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", check_same_thread=False)
    db.executescript(resources.files("pmd.memory").joinpath("schema.sql").read_text(encoding="utf-8"))
    return db


@cache
def _objects() -> frozenset[tuple[str, str]]:
    return frozenset(_blank().execute(_OBJECTS).fetchall())


@cache
def _columns() -> dict[str, list[tuple[str, str, int, int]]]:
    """Return name, type, NOT NULL and place in the primary key of the columns of each table."""
    return {table: _table_info(_blank(), table) for kind, table in sorted(_objects()) if kind == "table"}


def _table_info(db: sqlite3.Connection, table: str) -> list[tuple[str, str, int, int]]:
    rows = db.execute(f"PRAGMA table_xinfo({table})")
    return [(name, kind, required, key) for _, name, kind, required, _, key, hidden in rows if not hidden]


def _key(table: str) -> str:
    return {"meta": "key", "links": "child_id"}.get(table, "id")


def _conditions(table: str) -> dict[str, str]:
    """Return for each column the SQL that holds if its value is right."""
    found: dict[str, str] = {}
    for name, kind, required, _ in _columns()[table]:
        types = {"INTEGER": "('integer')", "REAL": "('real', 'integer')", "TEXT": "('text')", "BLOB": "('blob')"}[kind]
        parts = [f"typeof({name}) IN {types}" + ("" if required or name == "id" else f" OR {name} IS NULL")]
        if kind == "REAL":
            parts.append(f"{name} IS NULL OR abs({name}) <= {MAX_NUMBER}")
        if kind == "TEXT" and table != "meta" and name not in ("split", "kind", "status", "action"):
            parts.append(f"{name} IS NULL OR length(CAST({name} AS BLOB)) <= {MAX_TEXT}")
        if kind == "INTEGER" and name not in _RANGES:
            parts.append(f"{name} IS NULL OR abs({name}) <= {MAX_NUMBER}")
        if name == "embedding" and table != "insights":
            parts.append("embedding IS NOT NULL")
        if name in _RANGES:
            parts.append(_RANGES[name])
        found[name] = " AND ".join(f"({part})" for part in parts)
    return found


def _right(table: str) -> str:
    return " AND ".join(f"({condition})" for condition in _conditions(table).values())


def known_columns(table: str) -> dict[str, tuple[type, ...]]:
    """Return the Python types that the values of each column may have."""
    types: dict[str, tuple[type, ...]] = {
        "INTEGER": (int,), "REAL": (int, float), "TEXT": (str,), "BLOB": (bytes,)
    }  # fmt: skip
    return {
        name: types[kind] if required else (*types[kind], type(None)) for name, kind, required, _ in _columns()[table]
    }


def read_embedder_state(text: str, dimension: str) -> dict:
    """Return the embedder's state.

    Raises:
        ValueError: it is not one that an embedder wrote.
    """
    try:
        state = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(state, dict) or state.get("kind") not in ("hash", "sentence"):
        raise ValueError("no kind of embedder")
    if state["kind"] == "sentence":
        if not isinstance(state.get("path"), str) or not (
            dimension.isdecimal() and 0 < int(dimension[:9]) <= MAX_DIMENSION
        ):
            raise ValueError("no path, or no dimension")
        return state
    table = state.get("document_frequencies")
    numbers = [state.get("dimension"), state.get("seed"), state.get("num_documents")]
    if not isinstance(table, dict) or any(type(number) is not int for number in [*numbers, *table.values()]):
        raise ValueError("no word table")
    if not (0 < state["dimension"] <= MAX_DIMENSION and str(state["dimension"]) == dimension):
        raise ValueError(f"dimension={dimension[:40]}")
    if len(table) > MAX_WORD_TABLE or any(not 0 <= n <= state["num_documents"] for n in table.values()):
        raise ValueError("word frequencies")
    return state

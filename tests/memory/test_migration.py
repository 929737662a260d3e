"""Stores and exports of earlier versions open with all they held, and their history still leads back.

`data/memory_v2.sqlite` was written by a program of schema version 2; the `.expected.json` beside it says what that
program read from it, and from its exports, under its own names.
"""

import json
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from memory_world import make_rollout, make_task

from pmd.cli.memory import main
from pmd.config.schema import MemoryConfig
from pmd.memory.index import TaskIndex
from pmd.memory.judge import ItemAudit
from pmd.memory.retrieve import Retriever
from pmd.memory.store import TABLES, MemoryStore
from pmd.memory.tools.check import check
from pmd.memory.tools.history import diff, rollback
from pmd.memory.tools.transfer import import_file
from pmd.memory.update import open_writer

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "memory_v2.expected.json").read_text(encoding="utf-8"))
AUDIT_COLUMNS_OF_VERSION_2 = (
    "version", "num_correct", "num_wrong", "masked_lift_correct", "masked_lift_wrong", "student_lift",
)  # fmt: skip
STATUS = {"absorbed": "internalized", "shadow": "active"}  # old name -> new one


@pytest.fixture(params=[1, 2])
def old(request, tmp_path) -> Path:
    """A copy of the store as a program of version 1 or 2 left it."""
    path = tmp_path / "memory.sqlite"
    shutil.copyfile(DATA / "memory_v2.sqlite", path)
    if request.param == 1:
        with closing(sqlite3.connect(path)) as db:
            db.execute("DROP INDEX audits_by_item")
            for column in AUDIT_COLUMNS_OF_VERSION_2:
                db.execute(f"ALTER TABLE audits DROP COLUMN {column}")
            db.execute("PRAGMA user_version=1")
            db.commit()
    return path


def renamed(counts: dict[str, int]) -> dict[str, int]:
    """Return counts by status under the new names."""
    found: Counter[str] = Counter()
    for status, count in counts.items():
        found[STATUS.get(status, status)] += count
    return dict(found)


def renamed_status(row: dict) -> dict[str, str]:
    return {"status": STATUS.get(row["status"], row["status"])}


def count(store: MemoryStore, source: str) -> int:
    return store.query(f"SELECT count(*) FROM {source}")[0][0]


def tally(store: MemoryStore, table: str, column: str) -> dict[str, int]:
    return dict(store.query(f"SELECT {column}, count(*) FROM {table} GROUP BY 1"))


def test_everything_is_there_under_the_new_names(old):
    before = sqlite3.connect(old).execute("PRAGMA user_version").fetchone()[0]
    with MemoryStore.open(old) as store:
        assert store.query("PRAGMA user_version") == [(4,)]
        assert (store.generation, store.embedder.name) == (EXPECTED["generation"], EXPECTED["embedder"])
        assert count(store, "tasks") == len(store.tasks()) == EXPECTED["problems"]
        for table in ("experiences", "insights", "links", "audits", "retrievals", "ops"):
            assert count(store, table) == EXPECTED[table], table
        assert tally(store, "experiences", "status") == EXPECTED["experiences_by_status"]
        assert tally(store, "insights", "status") == renamed(EXPECTED["insights_by_status"])
        assert tally(store, "insights", "kind") == EXPECTED["insights_by_kind"]
        assert tally(store, "ops", "action") == EXPECTED["ops_by_action"]
        assert [
            {"id": i.id, "task_id": i.task_id, "kind": i.kind, "text": i.text, "support": i.support,
             "status": i.status, "usefulness": i.usefulness}
            for i in store.insights(None)
        ] == [row | renamed_status(row) for row in EXPECTED["insight_rows"]]  # fmt: skip
        assert [
            {"id": b.id, "polarity": "do", "text": b.text, "support": b.support, "version": b.version,
             "status": b.status, "usefulness": b.usefulness, "member_ids": list(b.member_ids)}
            for b in store.behaviours(None)
        ] == EXPECTED["behaviours"]  # fmt: skip
        detail = EXPECTED["audits_detail"] if before == 2 else {"by_item_version": {"1": EXPECTED["audits"]}}
        assert {str(version): n for version, n in tally(store, "audits", "version").items()} == detail[
            "by_item_version"
        ]
        if before == 2:
            sums = store.query("SELECT sum(num_correct), sum(num_wrong), count(masked_lift_wrong) FROM audits")
            assert sums == [(detail["num_correct"], detail["num_wrong"], detail["with_masked_lift_wrong"])]
        was = EXPECTED["stats"]
        wanted = {key: was[key] for key in was if key not in ("problems", "insights_shadow", "insights_absorbed")}
        wanted |= {"tasks": was["problems"], "insights_internalized": was["insights_absorbed"]}
        wanted["insights"] += was["insights_shadow"]  # what was on probation is active
        wanted["kind_lesson"] += was["insights_shadow"]
        found = store.stats()
        assert found.pop("distinct_insights") >= wanted.pop("distinct_insights")
        assert found == wanted
        assert check_without_index(store) == []


def check_without_index(store: MemoryStore) -> list[str]:
    return [sentence for sentence in check(store) if "index file" not in sentence]


def test_a_migrated_file_has_the_schema_of_a_new_one(old, tmp_path):
    with MemoryStore.open(old) as store, MemoryStore.open(tmp_path / "new.sqlite", embedder=store.embedder) as new:
        tables = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY 1"
        assert store.query(tables) == new.query(tables)
        for (table,) in new.query(tables):
            for pragma in ("table_info", "foreign_key_list", "index_list"):
                assert store.query(f"PRAGMA {pragma}({table})") == new.query(f"PRAGMA {pragma}({table})"), table
        with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
            store.db.execute("UPDATE insights SET status = 'shadow'")


def test_a_reader_changes_nothing(old):
    data = old.read_bytes()
    with MemoryStore.open(old, read_only=True) as store:
        assert len(store.insights(None)) == EXPECTED["insights"]
        with pytest.raises(sqlite3.OperationalError):
            store.db.execute("DELETE FROM insights")
    assert old.read_bytes() == data


def test_a_migration_that_fails_leaves_the_file_as_it_was(old):
    with closing(sqlite3.connect(old)) as db:
        db.execute("UPDATE ops SET before = 'not JSON' WHERE action = 'change'")
        db.commit()
        before = list(db.iterdump())
    with pytest.raises(Exception, match=r"could not be brought from schema version=. to 4 .* it is unchanged"):
        MemoryStore.open(old)
    with closing(sqlite3.connect(old)) as db:
        assert list(db.iterdump()) == before


def items_of(store: MemoryStore, task_key: str, task_id: str) -> list[dict]:
    retriever = Retriever(store, TaskIndex.open(store), MemoryConfig(k=4))
    return [
        {"level": i.level, "id": i.item_id, "kind": i.kind, "text": i.text, "similarity": i.similarity,
         "score": i.score, "task_id": i.task_id}
        for i in retriever.retrieve(task_key, seed=0, task_id=task_id)
    ]  # fmt: skip


def assert_retrieves(store: MemoryStore, wanted: list[dict]) -> None:
    retriever = Retriever(store, TaskIndex.open(store), MemoryConfig(k=4))
    for query in wanted:
        assert items_of(store, query["task_key"], query["task_id"]) == query["items"]
        assert retriever.past_success(query["task_id"]) == query["past_success"]


def test_the_same_is_retrieved(old):
    with MemoryStore.open(old) as store:
        assert_retrieves(store, EXPECTED["retrieved"])


def test_differences_reach_back_across_the_migration(old):
    with MemoryStore.open(old) as store:
        for key, wanted in EXPECTED["differences_by_generation"].items():
            first, last = (int(number) for number in key.split(" to "))
            # What went on probation was active before and is active now: nothing of it has changed.
            wanted = {STATUS.get(change, change): n for change, n in wanted.items() if change != "shadow"}
            assert Counter(difference.change for difference in diff(store, first, last)) == wanted
        rows = store.query("SELECT before, after FROM ops")
        for text in (text for row in rows for text in row if text is not None):
            assert not {"problem_id", "polarity", "title", "model"} & set(json.loads(text))
            assert json.loads(text).get("status") not in STATUS
        reasons = {reason for (reason,) in store.query("SELECT DISTINCT reason FROM ops")}
        assert "audit: internalized, the student gains 0.004" in reasons


def delete_as_before(db: sqlite3.Connection, level: int, table: str, item_id: int) -> None:
    """Delete an item and log it in generation 3, as a program of version 2 did."""
    cursor = db.execute(f"SELECT * FROM {table} WHERE id = ?", (item_id,))
    row = dict(zip([column[0] for column in cursor.description], cursor.fetchone(), strict=True))
    row.pop("embedding", None)
    parents = db.execute(
        "SELECT parent_id FROM links WHERE child_level = ? AND child_id = ? ORDER BY 1", (level, item_id)
    )
    row["parents"] = [parent for (parent,) in parents]
    db.execute("DELETE FROM links WHERE child_level = ? AND child_id = ?", (level, item_id))
    db.execute(f"DELETE FROM {table} WHERE id = ?", (item_id,))
    db.execute(
        "INSERT INTO ops (generation, level, item_id, action, before, after, reason)"
        " VALUES (3, ?, ?, 'delete', ?, NULL, 'gone')",
        (level, item_id, json.dumps(row, ensure_ascii=False, sort_keys=True)),
    )


def test_what_was_deleted_before_comes_back_by_rollback_and_ids_are_never_reused(old):
    with closing(sqlite3.connect(old)) as db:
        oldest = {
            level: db.execute(f"SELECT max(id) FROM {table} WHERE generation <= 2").fetchone()[0]
            for level, table in TABLES.items()
        }
        for level, table in TABLES.items():
            delete_as_before(db, level, table, oldest[level])
        delete_as_before(db, 1, "insights", EXPECTED["insights"])  # the highest id, of generation 3
        next_ids = dict(db.execute("SELECT name, seq FROM sqlite_sequence"))
        db.commit()
    with MemoryStore.open(old) as store:
        sequence = dict(store.query("SELECT name, seq FROM sqlite_sequence"))
        assert sequence == {"tasks" if name == "problems" else name: seq for name, seq in next_ids.items()}
        assert sequence["insights"] == EXPECTED["insights"] > max(item.id for item in store.insights(None))
        rollback(store, 2)
        for level, table in TABLES.items():
            assert count(store, f"{table} WHERE id = {oldest[level]}") == 1, table
        assert diff(store, 2, 4) == []
        assert check_without_index(store) == []


def test_rollback_and_an_update_after_the_migration(old):
    changed = {row["insight_id"]: row["from"] for row in EXPECTED["status_changes"]}
    with MemoryStore.open(old) as store:
        rollback(store, 2)
        status = {item.id: item.status for item in store.insights(None)}
        assert all(status[insight_id] == was for insight_id, was in changed.items() if insight_id in status)
        assert diff(store, 2, 4) == []
        rollback(store, 3)
        assert diff(store, 3, 5) == []
        assert tally(store, "insights", "status") == renamed(EXPECTED["insights_by_status"])
        with open_writer(store) as writer:
            task_row = writer.add_task(make_task("new", key="red 1 zam"))
            parent = writer.add_experience(task_row, make_rollout("new"), 9)
            item = writer.add_insight(task_row, "lesson", "not zam red>gold", policy_version=9, parents=[parent])
            writer.audit([ItemAudit(0, "g", 1, item, 1, 1, 0.1, 0.0, None, None, None)])
            changes = [cluster.change(cluster.texts[0]) for cluster in writer.clusters()]
            writer.replace_behaviours(changes, policy_version=9)
        assert item == 1 + EXPECTED["insights"]
        assert (store.generation, check_without_index(store)) == (6, [])
    with MemoryStore.open(old, read_only=True) as store:
        assert store.generation == 6


def test_commands(old, tmp_path, capsys):
    assert main(["check", str(old)]) == 1
    assert "there is no index file" in capsys.readouterr().out
    for command in (
        ["rebuild"], ["check"], ["stats"], ["list", "task"], ["list", "--status", "internalized"],
        ["show", "insight", "2"], ["diff", "1", "3"], ["audit"], ["report", "--out", str(tmp_path / "report.html")],
        ["export", str(tmp_path / "export.jsonl")], ["rollback", "1"], ["import", str(tmp_path / "export.jsonl")],
        ["check"],
    ):  # fmt: skip
        assert main([command[0], str(old), *command[1:]]) == 0, command


@pytest.mark.parametrize("name", ["memory_v1_export.jsonl", "memory_v1_export_experiences.jsonl"])
def test_exports_of_format_version_1_are_imported(tmp_path, name):
    wanted = EXPECTED[f"import of {name} into an empty store"]
    shutil.copyfile(DATA / "memory_v2.sqlite", tmp_path / "old.sqlite")
    with MemoryStore.open(tmp_path / "old.sqlite", read_only=True) as store:
        embedder = store.embedder
    with MemoryStore.open(tmp_path / "new.sqlite", embedder=embedder) as store:
        counts = import_file(store, DATA / name)
        assert counts == {"task" if key == "problem" else key: n for key, n in wanted["new"].items()}
        assert tally(store, "insights", "status") == wanted["insights_by_status"]
        assert (count(store, "links"), store.generation) == (wanted["links"], wanted["generation"])
        assert_retrieves(store, wanted["retrieved"])
        assert check_without_index(store) == []
        assert set(import_file(store, DATA / name).values()) == {0}
    assert set(TABLES.values()) | {"task"} == set(counts)

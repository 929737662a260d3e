"""The store is bounded: what is older than the kept generations goes, and nothing that anything still needs."""

import json
import multiprocessing
import os
import random
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from memory_world import World, make_rollout, make_task, start_process
from test_history import check_without_index, items

from pmd.cli import main
from pmd.errors import MemoryStoreError
from pmd.memory.judge import ItemAudit
from pmd.memory.store import MAX_EVIDENCE, MemoryStore
from pmd.memory.tools.compact import compact_store
from pmd.memory.tools.history import diff, rollback
from pmd.memory.tools.report import growth, render
from pmd.memory.update import MAX_AUDITS, compact, open_writer
from pmd.types import MemoryItem

KEEP = 3


@pytest.fixture(scope="module")
def few() -> World:
    return World(families=6)


def log_and_audit(store: MemoryStore, epoch: int) -> None:
    """Log a retrieval of each live insight, and audit one of them as useful."""
    shown = [MemoryItem(i.id, 1, "lesson", i.text, i.task_row, i.task_id, 0.5, 0.5) for i in store.insights()[:20]]
    with open_writer(store) as writer:
        writer.log_retrievals(epoch, f"g{epoch}", shown)
        writer.audit([ItemAudit(epoch, f"g{epoch}", 1, shown[0].item_id, 1, 1, 0.5, -0.2, None, None, None)])


def dump(store: MemoryStore) -> list[str]:
    return list(store.db.iterdump())


def test_every_kept_generation_can_be_restored_and_earlier_ones_are_refused(few, open_store):
    store = open_store(embedder=few.embedder(), keep_generations=KEEP, insights_per_task=2, experiences_per_task=1)
    seen = {}
    for epoch in range(9):
        few.write_epoch(store, epoch)
        seen[store.generation] = items(store)
    last = store.generation
    assert store.history_from == last - KEEP
    store.close()
    data = store.path.read_bytes()
    for generation in range(last - KEEP, last):
        MemoryStore.restore(store.path, data)
        store = open_store(embedder=few.embedder(), keep_generations=KEEP, insights_per_task=2, experiences_per_task=1)
        rollback(store, generation)
        now, then = items(store), seen[generation]
        for table in ("experiences", "insights", "behaviours"):
            status = {"experiences": 4, "insights": 5, "behaviours": 4}[table]
            kept = {row[0] for row in now[table]}
            gone = [row for row in then[table] if row[0] not in kept]
            assert {row[status] for row in gone} <= {"retired"}
            assert now[table] == [row for row in then[table] if row[0] in kept], (generation, table)
        assert check_without_index(store) == []
        with pytest.raises(MemoryStoreError, match=rf"has {store.history_from} to .* \(memory.keep_generations"):
            diff(store, store.history_from - 1, store.generation)
        assert store.history_from == store.generation - KEEP
        store.close()


def test_compaction_drops_only_what_the_kept_generations_share(few, open_store):
    """The same history with and without: the live items are equal, and so is every difference within the window."""
    whole = open_store("whole.sqlite", embedder=few.embedder(), keep_generations=None, insights_per_task=2)
    for epoch in range(8):
        few.write_epoch(whole, epoch)
        log_and_audit(whole, epoch)
    short = open_store("short.sqlite", embedder=few.embedder(), keep_generations=None)
    short.close()
    MemoryStore.restore(short.path, whole.snapshot())
    with MemoryStore.open(short.path, embedder=few.embedder()) as short:
        before = growth(short)
        with open_writer(short) as writer:
            dropped = compact(writer.ledger.db, writer.ledger.generation, 4, None)
        assert all(dropped[table] > 0 for table in ("retrievals", "insights", "ops"))
        for read in (MemoryStore.experiences, MemoryStore.insights, MemoryStore.behaviours):
            assert read(short) == read(whole)
        since = short.history_from
        assert since == short.generation - 4
        for old in range(since, whole.generation + 1):
            assert diff(short, old, whole.generation) == diff(whole, old, whole.generation)
        kept = {row[0] for row in short.query("SELECT id FROM experiences")}
        assert {row[0] for row in short.query("SELECT parent_id FROM links WHERE parent_level = 0")} <= kept
        assert growth(short)[0] == before[since]
        assert len(growth(short)) == 5
        assert "Growth" in render(short, "x")
        assert check_without_index(short) == []
        assert short.stats()["retrievals"] == whole.stats()["retrievals"]


def test_what_audits_found_outlives_the_window(open_store):
    """A harmful insight stays retired for good; usefulness keeps its evidence, but only the newest of it."""
    store = open_store(keep_generations=2)
    with open_writer(store) as writer:
        row = writer.add_task(make_task())
        bad = writer.add_insight(row, "lesson", "a harmful text", policy_version=0)
        good = writer.add_insight(row, "strategy", "a useful text", policy_version=0)
        old = writer.add_insight(row, "strategy", "a passing thought", policy_version=0)
        writer.set_status(1, old, "retired", "reflection")
    for step in range(MAX_AUDITS + 8):
        with open_writer(store) as writer:
            audits = [ItemAudit(step, f"g{step}", 1, good, 1, 1, 0.5 + step, -0.2, None, None, None)]
            if step < 3:
                audits.append(ItemAudit(step, f"g{step}", 1, bad, 1, 1, -0.5, 0.2, None, None, None))
            writer.audit(audits)
    rows = {i.id: i for i in store.insights(None)}
    assert rows[bad].status == "retired"
    assert old not in rows
    assert store.query("SELECT count(*) FROM audits WHERE item_id = ?", good)[0][0] <= MAX_AUDITS + 3
    assert store.query("SELECT min(step) FROM audits WHERE item_id = ?", good)[0][0] >= 5
    assert store.query("SELECT count(*) FROM ops")[0][0] < 12
    with open_writer(store) as writer:
        assert writer.add_insight(row, "lesson", "a harmful text", policy_version=9) == bad
        assert writer.add_insight(row, "strategy", "a passing thought", policy_version=9) > good
    rows = {i.id: i for i in store.insights(None)}
    assert rows[bad].status == "retired"
    assert store.health(9)["harmful_share"] == 0.5


def test_an_edited_insight_outlives_its_earlier_versions(open_store):
    store = open_store(keep_generations=2)
    with open_writer(store) as writer:
        row = writer.add_task(make_task())
        current = writer.add_insight(row, "lesson", "text 0", policy_version=0)
    for n in range(1, 9):
        with open_writer(store) as writer:
            current = writer.edit_insight(current, f"text {n}", policy_version=n)
    assert [i.text for i in store.insights()] == ["text 8"]
    assert len(store.insights(None)) <= 4
    rollback(store, store.generation - 2)
    assert [i.text for i in store.insights()] == ["text 6"]
    assert check_without_index(store) == []


def test_evidence_is_the_newest_and_bounded(open_store):
    store = open_store(keep_generations=2, experiences_per_task=1)
    for n in range(MAX_EVIDENCE + 10):
        with open_writer(store) as writer:
            row = writer.add_task(make_task())
            parent = writer.add_experience(row, make_rollout(text=f"attempt {n}"), n)
            insight = writer.add_insight(row, "strategy", "the same", policy_version=n, parents=[parent])
    linked = [row[0] for row in store.query("SELECT parent_id FROM links WHERE child_id = ? ORDER BY 1", insight)]
    assert len(linked) == MAX_EVIDENCE
    assert linked[-1] == parent
    assert store.query("SELECT count(*) FROM experiences")[0][0] <= MAX_EVIDENCE + 1
    assert store.insights()[0].support == MAX_EVIDENCE + 10


def test_the_store_stops_growing(few, open_store):
    """Sizes after twice the window and after four times the window; without a bound the log alone doubles."""
    sizes = {}
    for keep in (KEEP, None):
        store = open_store(f"{keep}.sqlite", embedder=few.embedder(), keep_generations=keep)
        sizes[keep] = []
        for epoch in range(4 * KEEP):
            few.write_epoch(store, epoch)
            log_and_audit(store, epoch)
            sizes[keep].append(len(store.snapshot()))
    assert sizes[KEEP][-1] < 1.1 * sizes[KEEP][2 * KEEP]
    assert sizes[None][-1] > 1.5 * sizes[None][2 * KEEP - 1]


def test_the_archive_holds_what_was_dropped(few, open_store):
    plain = open_store("plain.sqlite", embedder=few.embedder(), keep_generations=2)
    (plain.path.parent / "kept").mkdir()
    kept = open_store("kept/m.sqlite", embedder=few.embedder(), keep_generations=2, archive=True)
    for epoch in range(5):
        few.write_epoch(plain, epoch)
        few.write_epoch(kept, epoch)
    assert dump(plain) == dump(kept)
    files = sorted((kept.path.parent / "archive").iterdir())
    assert [file.name for file in files] == [f"generation-{n:06d}.jsonl" for n in (3, 4, 5)]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    ops = {row["id"] for row in rows if row["table"] == "ops"}
    still = {row[0] for row in kept.query("SELECT id FROM ops")}
    assert ops | still == set(range(1, kept.query("SELECT max(id) FROM ops")[0][0] + 1))
    assert not ops & still
    assert not (plain.path.parent / "archive").exists()


def test_an_archive_that_cannot_be_written_stops_the_update(few, open_store):
    store = open_store(embedder=few.embedder(), keep_generations=1, archive=True)
    few.write_epoch(store, 0)
    (store.path.parent / "archive").write_text("in the way")
    with pytest.raises(MemoryStoreError, match=r"memory archive=.* cannot be written"):
        few.write_epoch(store, 1)
    assert store.generation == 1
    (store.path.parent / "archive").unlink()
    few.write_epoch(store, 1)


def test_the_command_compacts_and_other_commands_drop_nothing(few, open_store, capsys):
    store = open_store(embedder=few.embedder(), keep_generations=None)
    for epoch in range(12):
        few.write_epoch(store, epoch)
    live, size = store.insights(), store.path.stat().st_size
    store.close()
    assert main(["memory", "rollback", str(store.path), "12"]) == 0
    with MemoryStore.open(store.path, read_only=True) as reader:
        assert reader.history_from == 0
    assert main(["memory", "compact", str(store.path), "--keep", "2", "--archive"]) == 0
    assert "rows dropped" in capsys.readouterr().out
    assert store.path.stat().st_size < 0.7 * size
    assert (store.path.parent / "archive" / "generation-000014.jsonl").exists()
    with MemoryStore.open(store.path, read_only=True) as reader:
        assert reader.insights() == live
        assert reader.history_from == 12
    assert main(["memory", "rebuild", str(store.path)]) == 0
    assert main(["memory", "check", str(store.path)]) == 0
    assert main(["memory", "diff", str(store.path), "3", "13"]) == 1
    assert "generation=3 is not in the store, which has 12 to 14" in capsys.readouterr().err


def compact_and_die(path: str, statement: str) -> None:
    """Compact, and die as SQLite begins the first statement that starts so."""
    store = MemoryStore.open(path, embedder=World(families=6).embedder())
    store.db.set_trace_callback(lambda sql: os._exit(9) if sql.startswith(statement) else None)
    compact_store(store, 2, archive=False)


def compact_when_told(path: str, told: Connection) -> None:
    with MemoryStore.open(path, embedder=World(families=6).embedder()) as store:
        told.send("now")
        compact_store(store, 2, archive=False)


@pytest.fixture
def states(few, open_store, tmp_path) -> tuple[Path, list[str], list[str], float]:
    """A store of ten epochs, its content before and after compaction, and the seconds that compaction takes."""
    store = open_store("before.sqlite", embedder=few.embedder(), keep_generations=None)
    for epoch in range(10):
        few.write_epoch(store, epoch)
    before = dump(store)
    store.close()
    shutil.copy(store.path, tmp_path / "after.sqlite")
    with MemoryStore.open(tmp_path / "after.sqlite", embedder=few.embedder()) as after:
        started = time.perf_counter()
        compact_store(after, 2, archive=False)
        seconds = time.perf_counter() - started
        return store.path, before, dump(after), seconds


def copied(path: Path, name: str) -> Path:
    copy = path.with_name(name)
    shutil.copy(path, copy)
    shutil.copy(f"{path}.sum", f"{copy}.sum")
    return copy


def test_killed_at_each_step_of_compaction_the_store_is_as_before_or_after(few, states):
    path, before, after, _ = states
    steps = {"DELETE FROM ops": before, "COMMIT": before, "PRAGMA wal_checkpoint": after, "VACUUM": after}
    for number, (statement, expected) in enumerate(steps.items()):
        copy = copied(path, f"{number}.sqlite")
        process = start_process(compact_and_die, str(copy), statement)
        process.join()
        assert process.exitcode == 9, statement
        assert main(["memory", "stats", str(copy)]) == 0
        with MemoryStore.open(copy, embedder=few.embedder()) as opened:
            assert dump(opened) == expected, statement
        assert main(["memory", "rebuild", str(copy)]) == 0
        assert main(["memory", "check", str(copy)]) == 0


@pytest.mark.slow
def test_killed_at_any_moment_of_compaction_the_store_is_as_before_or_after(few, states):
    path, before, after, seconds = states
    moments, found = random.Random(0), []
    for number in range(60):
        copy = copied(path, f"{number}.sqlite")
        receiving, sending = multiprocessing.Pipe(duplex=False)
        process = start_process(compact_when_told, str(copy), sending)
        assert receiving.recv() == "now"
        time.sleep(moments.uniform(0, 2 * seconds))
        process.kill()
        process.join()
        with MemoryStore.open(copy, embedder=few.embedder()) as opened:
            content = dump(opened)
        assert content in (before, after)
        found.append(content == after)
        assert main(["memory", "stats", str(copy)]) == 0
    print(f"{found.count(False)} as before, {found.count(True)} as after")

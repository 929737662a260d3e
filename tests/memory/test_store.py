"""One truth: transactions, damage, mismatch, snapshots, kills."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from memory_world import World, leave_a_log, make_task, start_process

from pmd.errors import MemoryStoreError
from pmd.memory.embed import HashEmbedder
from pmd.memory.index import TaskIndex
from pmd.memory.store import MemoryStore
from pmd.memory.update import open_writer
from pmd.types import MemoryItem


def dump(store: MemoryStore) -> list[str]:
    return list(store.db.iterdump())


def test_an_update_is_whole_or_nothing(open_store):
    store = open_store()
    with open_writer(store) as writer:
        task_row = writer.add_task(make_task())
    before = dump(store)

    def fail_half_way():
        with open_writer(store) as writer:
            writer.add_task(make_task("other"))
            writer.add_insight(task_row, "lesson", "a", policy_version=0)
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert dump(store) == before
    assert store.generation == int(store.meta("generation")) == 1
    with open_writer(store):
        pass
    assert store.generation == int(store.meta("generation")) == 2


def test_updates_do_not_nest(open_store):
    store = open_store()
    with pytest.raises(MemoryStoreError, match="inside"), open_writer(store), open_writer(store):
        pass
    assert store.generation == 0


def test_a_second_writer_is_found_out(open_store):
    first, second = open_store(), open_store()
    with open_writer(first) as writer:
        writer.add_task(make_task())
    with pytest.raises(MemoryStoreError, match="another process wrote to it"), open_writer(second):
        pass
    assert first.generation == int(second.meta("generation")) == 1


def test_retrievals_are_logged_with_the_generation_that_was_read(open_store):
    store = open_store()
    shown, dropped = MemoryItem(3, 1, "lesson", "x", 1, "t", 0.5), MemoryItem(4, 1, "lesson", "y", 1, "t", 0.4)

    def log_and_fail():
        with open_writer(store) as writer:
            writer.log_retrievals(7, "g", [shown], [dropped])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        log_and_fail()
    assert store.query("SELECT count(*) FROM retrievals") == [(0,)]
    with open_writer(store) as writer:
        writer.log_retrievals(7, "g", [shown], [dropped])
    sql = "SELECT generation, step, group_id, level, item_id, rank, similarity, included FROM retrievals"
    assert store.query(sql) == [(0, 7, "g", 1, 3, 0, 0.5, 1), (0, 7, "g", 1, 4, 1, 0.4, 0)]


def test_two_equal_builds_have_equal_content(world, tmp_path):
    dumps, files = [], []
    for name in ("a", "b"):
        store = MemoryStore.open(tmp_path / name / "m.sqlite", embedder=world.embedder())
        world.write_epoch(store, 0)
        world.write_epoch(store, 1)
        TaskIndex.open(store)
        dumps.append(dump(store))
        files.append((tmp_path / name / "tasks.hnsw").read_bytes())
        store.close()
    assert dumps[0] == dumps[1]
    assert files[0] == files[1]


def test_snapshot_and_restore(world, tmp_path):
    path = tmp_path / "m.sqlite"
    store = MemoryStore.open(path, embedder=world.embedder())
    world.write_epoch(store, 0)
    data, content = store.snapshot(), dump(store)
    world.write_epoch(store, 1)
    later = dump(store)
    store.close()
    MemoryStore.restore(path, data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.sqlite", "m.sqlite.sum"]
    store = MemoryStore.open(path, embedder=world.embedder())
    assert dump(store) == content != later
    assert store.snapshot() == data
    world.write_epoch(store, 1)  # going on from the snapshot equals never having stopped
    assert dump(store) == later
    store.close()


def test_restore_is_not_undone_by_a_log_left_behind(world, tmp_path):
    path = tmp_path / "m.sqlite"
    store = MemoryStore.open(path, embedder=world.embedder())
    data = store.snapshot()
    store.close()
    leave_a_log(path, 0)  # of a process that died while a reader was in the way
    MemoryStore.restore(path, data)
    store = MemoryStore.open(path, embedder=world.embedder())
    assert store.generation == 0
    assert store.tasks() == []
    store.close()


def test_restore_refuses_bad_bytes_and_leaves_the_file(open_store, tmp_path):
    store = open_store()
    data = store.snapshot()
    store.close()
    for bad in (b"not a store", data[: len(data) // 2], b""):
        with pytest.raises(MemoryStoreError, match="memory store="):
            MemoryStore.restore(store.path, bad)
    reopened = open_store()
    assert reopened.generation == 0
    assert sorted(p.suffix for p in tmp_path.iterdir() if not p.name.startswith("memory.sqlite-")) == [
        ".sqlite", ".sum"
    ]  # fmt: skip


def test_open_refuses_another_embedder(open_store):
    open_store(embedder=HashEmbedder(64)).close()
    for other in (HashEmbedder(32), HashEmbedder(64, seed=1), HashEmbedder.fit(["a b", "b"], dimension=64)):
        with pytest.raises(MemoryStoreError, match=f"memory.embedder={other.name} .* is not the embedder of store="):
            open_store(embedder=other)


def test_the_store_knows_its_own_embedder(open_store):
    embedder = HashEmbedder.fit(["a b", "b c"], dimension=64)
    store = open_store(embedder=embedder)
    store.close()
    with MemoryStore.open(store.path, read_only=True) as reader:
        assert reader.embedder.name == embedder.name
        assert (reader.embedder.embed(["a c d"]) == embedder.embed(["a c d"])).all()
        with pytest.raises(MemoryStoreError, match="could not be written"), open_writer(reader) as writer:
            writer.add_task(make_task())


def test_open_refuses_what_is_no_store_of_this_version(open_store, tmp_path):
    missing = tmp_path / "missing.sqlite"
    with pytest.raises(MemoryStoreError, match="does not exist"):
        MemoryStore.open(missing, read_only=True)
    assert not missing.exists()
    (tmp_path / "text.sqlite").write_text("no database, but long enough to be read as one\n" * 100)
    with pytest.raises(MemoryStoreError, match=r"text.sqlite is damaged or no SQLite file"):
        open_store("text.sqlite")
    store = open_store()
    store.db.execute("PRAGMA user_version=99")
    store.close()
    with pytest.raises(MemoryStoreError, match="schema version=99, this program reads 1"):
        open_store()


def test_open_refuses_a_damaged_file(world, tmp_path):
    path = tmp_path / "m.sqlite"
    store = MemoryStore.open(path, embedder=world.embedder())
    world.write_epoch(store, 0)
    store.close()
    data = bytearray(path.read_bytes())
    for page in range(4, len(data) // 4096, 3):
        data[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    path.write_bytes(data)
    with pytest.raises(MemoryStoreError, match="is damaged"):
        MemoryStore.open(path, embedder=world.embedder())


def write_forever(path: str, told: Connection) -> None:
    """Write, snapshot, restore and index without end; tell each generation that was committed."""
    world = World()
    store = MemoryStore.open(path, embedder=world.embedder())
    index = TaskIndex.open(store)
    told.send(store.generation)
    while True:
        world.write_epoch(store, store.generation, attempts=2)
        told.send(store.generation)
        index.refresh()
        data = store.snapshot()
        store.close()
        MemoryStore.restore(path, data)
        store = MemoryStore.open(path, embedder=world.embedder())
        index = TaskIndex.open(store)


def kill_and_reopen(world, folder: Path, moments: random.Random, kills: int) -> int:
    """Kill a writing process again and again; returns the generation that was reached."""
    path = folder / "m.sqlite"
    reference = MemoryStore.open(folder / "reference.sqlite", embedder=world.embedder())
    contents = {0: dump(reference)}
    for kill in range(kills):
        receiving, sending = multiprocessing.Pipe(duplex=False)
        process = start_process(write_forever, str(path), sending)
        sending.close()
        told = [receiving.recv()]
        if kill == 0:  # on a busy machine too, something is committed before the first kill
            told.append(receiving.recv())
        time.sleep(moments.uniform(0.0, 0.6))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with contextlib.suppress(EOFError):  # the killed process's end of the pipe is closed
            while True:
                told.append(receiving.recv())
        with MemoryStore.open(path, embedder=world.embedder()) as store:
            assert store.generation >= max(told)  # nothing committed is lost
            while reference.generation < store.generation:
                world.write_epoch(reference, reference.generation, attempts=2)
                contents[reference.generation] = dump(reference)
            assert dump(store) == contents[store.generation]  # nothing half written
            assert len(TaskIndex.open(store)) == len(store.tasks())
    reference.close()
    return reference.generation


@pytest.mark.parametrize("rounds", [1, pytest.param(34, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_killed_at_any_moment_the_store_opens_whole(world, tmp_path, rounds):
    """Kills fall into writing, clustering, snapshots, restoring and the making of the index."""
    moments = random.Random(rounds)
    for n in range(rounds):
        folder = tmp_path / str(n)
        folder.mkdir()
        assert kill_and_reopen(world, folder, moments, kills=6) >= 1


def test_a_full_disk_is_named_and_harms_nothing(world, tmp_path):
    """A limit on file sizes stands for the disk: hnswlib reports nothing when its file is cut short."""
    script = textwrap.dedent(f"""
        import resource, signal
        from memory_world import World
        from pmd.errors import MemoryStoreError
        from pmd.memory.index import TaskIndex
        from pmd.memory.store import MemoryStore
        world = World()
        store = MemoryStore.open({str(tmp_path / "m.sqlite")!r}, embedder=world.embedder())
        world.write_epoch(store, 0)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        for act in (lambda: TaskIndex.open(store), lambda: world.write_epoch(store, 1)):
            try:
                act()
            except MemoryStoreError as error:
                print(error)
        assert store.generation == 1
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    index_error, store_error = done.stdout.splitlines()
    assert "could not be written whole; check free disk space" in index_error
    assert "could not be written (" in store_error
    with MemoryStore.open(tmp_path / "m.sqlite", embedder=world.embedder()) as store:
        assert store.generation == 1
        assert len(TaskIndex.open(store)) == 192

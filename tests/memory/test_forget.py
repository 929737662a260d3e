"""Forgetting a task: its items go, what rests on them loses evidence, the log keeps it all, and it can be undone."""

import pytest
from memory_world import World

from pmd.cli import main
from pmd.errors import MemoryStoreError
from pmd.memory.store import MemoryStore
from pmd.memory.tools.check import check
from pmd.memory.tools.forget import forget_task
from pmd.memory.tools.history import rollback


@pytest.fixture
def path(tmp_path):
    world = World(families=3)
    with MemoryStore.open(tmp_path / "memory.sqlite", embedder=world.embedder()) as store:
        world.write_epoch(store, 0)
        world.write_epoch(store, 1)
    return tmp_path / "memory.sqlite"


def rows_of(store: MemoryStore, task_id: str) -> list[int]:
    return [
        store.query(f"SELECT count(*) FROM {table} JOIN tasks ON task_row = tasks.id WHERE task_id = ?", task_id)[0][0]
        for table in ("experiences", "insights")
    ]


def test_everything_of_a_task_goes_and_can_come_back(path):
    with MemoryStore.open(path) as store:
        task_id = store.tasks()[0].task_id
        other = store.tasks()[1].task_id
        before, others = rows_of(store, task_id), rows_of(store, other)
        support = dict(store.query("SELECT id, support FROM behaviours"))
        generation = store.generation
        sound = check(store)
        counts = forget_task(store, task_id)
        assert [counts["experiences"], counts["insights"]] == before
        assert min(before) > 0
        assert rows_of(store, task_id) == [0, 0]
        assert rows_of(store, other) == others
        now = dict(store.query("SELECT id, support FROM behaviours"))
        lost = sum(now.get(i, 0) < n for i, n in support.items())
        assert lost == counts["behaviours"] + counts["behaviours with less evidence"] > 0
        assert check(store) == sound
        logged = store.query(
            "SELECT count(*) FROM ops WHERE action = 'delete' AND reason = ?", f"task {task_id} forgotten"
        )
        assert logged[0][0] >= sum(before)
        rollback(store, generation)
        assert rows_of(store, task_id) == before
        assert dict(store.query("SELECT id, support FROM behaviours")) == support


def test_the_command_and_an_unknown_task(path, capsys):
    with MemoryStore.open(path) as store:
        task_id = store.tasks()[0].task_id
        with pytest.raises(MemoryStoreError, match="task_id=nope is not in"):
            forget_task(store, "nope")
    assert main(["memory", "forget", str(path), task_id]) == 0
    assert f"forgotten of task {task_id}" in capsys.readouterr().out

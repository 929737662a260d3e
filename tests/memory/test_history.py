"""Differences and rollbacks, exports and imports, checks, lineage."""

import json

import pytest
from memory_world import World, make_rollout, make_task

from pmd.cli.memory import main
from pmd.errors import MemoryStoreError
from pmd.memory.embed import HashEmbedder
from pmd.memory.index import TaskIndex
from pmd.memory.retrieve import Retriever
from pmd.memory.store import MemoryStore
from pmd.memory.tools.check import check
from pmd.memory.tools.history import diff, rollback
from pmd.memory.tools.transfer import export_file, export_lines, import_file
from pmd.memory.update import open_writer

ITEMS = {
    "experiences": "SELECT id, task_row, response, support, status FROM experiences ORDER BY id",
    "insights": "SELECT id, task_row, kind, content, support, status, last_policy_version FROM insights ORDER BY id",
    "behaviours": "SELECT id, content, support, version, status, evidence_sha FROM behaviours ORDER BY id",
    "links": "SELECT * FROM links ORDER BY 1, 2, 3, 4",
}


def items(store: MemoryStore) -> dict[str, list]:
    return {name: store.query(sql) for name, sql in ITEMS.items()}


@pytest.fixture(scope="module")
def few() -> World:
    return World(families=8)


@pytest.fixture
def store(few, tmp_path):
    with MemoryStore.open(tmp_path / "m.sqlite", embedder=few.embedder()) as store:
        yield store


def test_rollback_restores_every_item_and_can_be_rolled_back(few, store):
    seen = [items(store)]
    for epoch in range(3):
        few.write_epoch(store, epoch)
        seen.append(items(store))
    undone = rollback(store, 1)
    assert store.generation == 4
    assert items(store) == seen[1]
    assert {difference.change for difference in undone} >= {"added", "counted"}
    assert diff(store, 1, 4) == []
    rollback(store, 3)
    assert items(store) == seen[3]
    assert check_without_index(store) == []
    rollback(store, 0)
    assert items(store) == seen[0]
    assert len(store.tasks()) == 48  # facts stay


def check_without_index(store: MemoryStore) -> list[str]:
    return [sentence for sentence in check(store) if "index file" not in sentence]


def test_diff_says_what_happened(open_store):
    store = open_store(insights_per_task=1)
    with open_writer(store) as writer:
        task_row = writer.add_task(make_task())
        first = writer.add_insight(task_row, "lesson", "a", policy_version=0)
        writer.add_experience(task_row, make_rollout(text="x"), 0)
    with open_writer(store) as writer:
        second = writer.add_insight(task_row, "lesson", "b", policy_version=0)
        writer.add_experience(task_row, make_rollout(text="x"), 0)
    found = {(d.level, d.item_id): d.change for d in diff(store, 1, 2)}
    assert found == {(0, 1): "counted", (1, first): "retired", (1, second): "added"}
    back = {(d.level, d.item_id): d.change for d in diff(store, 2, 1)}
    assert back == {(0, 1): "counted", (1, first): "active", (1, second): "deleted"}
    assert len(diff(store, 0, 1)) == 2
    with pytest.raises(MemoryStoreError, match="generation=7 is not in the store, which has 0 to 2"):
        diff(store, 0, 7)


def test_an_export_gives_another_store_the_same_memory(world, grown, tmp_path):
    lines = export_file(grown, tmp_path / "m.jsonl")
    text = (tmp_path / "m.jsonl").read_text()
    assert len(text.splitlines()) == lines + 1
    assert '"experiences"' not in {json.loads(line).get("type") for line in text.splitlines()}
    with MemoryStore.open(tmp_path / "other.sqlite", embedder=world.embedder()) as other:
        counts = import_file(other, tmp_path / "m.jsonl")
        assert counts["task"] == 192
        assert counts["insights"] == len(grown.insights())
        assert counts["behaviours"] == len(grown.behaviours())
        assert check_without_index(other) == []
        one, two = (Retriever(s, TaskIndex.open(s), grown.config) for s in (grown, other))
        for key in map(world.key, world.names):
            found = [sorted(item.text for item in r.retrieve(key, seed=3)) for r in (one, two)]
            assert found[0] == found[1]
        again = import_file(other, tmp_path / "m.jsonl")
        assert set(again.values()) == {0}
    with MemoryStore.open(tmp_path / "third.sqlite", embedder=HashEmbedder(32)) as third:  # another embedder will do
        export_file(grown, tmp_path / "all.jsonl", experiences=True)
        assert import_file(third, tmp_path / "all.jsonl")["experiences"] == len(grown.experiences())
        world.write_epoch(third, 3)


def spoil(line_number: int, **fields):
    def change(lines: list[str]) -> list[str]:
        line = json.loads(lines[line_number]) | fields
        return [*lines[:line_number], json.dumps(line), *lines[line_number + 1 :]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: ["{}", *lines[1:]], ":1 has format=None"),
        (lambda lines: [], ":1 has format=None"),
        (spoil(0, version=3), ":1 has format=pmd-memory, version=3"),
        (lambda lines: [*lines[:5], "{half", *lines[5:]], ":6 is not a line"),
        (lambda lines: [lines[0], "[]"], ":2 is not a line"),
        (lambda lines: [lines[0], lines[-1]], ":2 is not a line|no insight"),
        (spoil(1, split="test"), "split=test; memory keeps train only"),
        (spoil(1, **{"id) VALUES (1); --": 1}), ":2 is not a line .*unknown field"),
        (spoil(200, kind="spell"), ":201 is not a line .*kind='spell' must be one of strategy"),
        (spoil(200, task_row=10**9), ":201 is not a line"),
        (spoil(200, type="meta"), ":201 is not a line"),
        (spoil(200, content="half \ud83d"), r":201: content=.* holds half a character"),
        (lambda lines: [*lines[:5], '{"type": "task", "id": "\udcff"}'], r":6: id=.* holds half a character"),
    ],
)
def test_a_bad_import_changes_nothing(world, grown, store, tmp_path, change, message):
    lines = [json.dumps(line) for line in export_lines(grown)]
    lines = [line for line in lines if '"type": "behaviours"' not in line]
    (tmp_path / "bad.jsonl").write_bytes("\n".join(change(lines)).encode(errors="surrogateescape"))
    with pytest.raises(MemoryStoreError, match=message):
        import_file(store, tmp_path / "bad.jsonl")
    assert store.tasks() == []
    assert store.generation == 0


def test_check_finds_what_is_wrong(few, store):
    few.write_epoch(store, 0)
    TaskIndex.open(store)
    assert check(store) == []
    store.db.execute("UPDATE tasks SET embedding = zeroblob(2048) WHERE id = 3")
    store.db.execute("DELETE FROM links WHERE child_level = 2 AND child_id = 1")
    store.db.execute("INSERT INTO links VALUES (1, 99999, 0, 1)")
    found = " ".join(check(store))
    for sentence in ("vectors of tasks are not of length 1: 1", "rests on no insight: 1, first id 1",
                     "a link has no child: 1", "index file is not the store's"):  # fmt: skip
        assert sentence in found


def test_commands(few, store, tmp_path, capsys):
    few.write_epoch(store, 0)
    few.write_epoch(store, 1)
    path = str(store.path)
    assert main(["check", path]) == 1
    assert "there is no index file" in capsys.readouterr().out
    assert main(["rebuild", path]) == 0
    assert main(["check", path]) == 0
    assert main(["show", path, "behaviour", "1", "--lineage"]) == 0
    assert "lineage" in capsys.readouterr().out
    assert main(["show", path, "behaviour", "1", "--lineage", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["lineage"]
    assert {row["level"] for row in rows} == {0, 1, 2}
    assert main(["diff", path, "1", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["items"]) > 10
    assert main(["export", path, str(tmp_path / "m.jsonl")]) == 0
    store.close()
    assert main(["rollback", path, "1"]) == 0
    assert main(["import", path, str(tmp_path / "m.jsonl")]) == 0
    assert main(["check", path]) == 0

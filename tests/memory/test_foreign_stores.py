"""Stores and exports from strangers: refused in one sentence, or shown without obeying what they say."""

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing

import pytest
from memory_world import World
from test_damage import as_nobody, said

from pmd.cli import main
from pmd.cli.printable import printable, printable_json
from pmd.errors import MemoryStoreError
from pmd.memory.embed import HashEmbedder
from pmd.memory.index import TaskIndex
from pmd.memory.store import MemoryStore
from pmd.memory.tools.report import render

ESCAPES = "\x1b]0;title\x07 \x1b[31mred \x9b31m \u202eevil [red]markup[/] \ud800"


@pytest.fixture
def foreign(tmp_path):
    """A small store, and a way to change it behind pmd's back, with a checksum that fits."""
    world = World(families=3)
    path = tmp_path / "m.sqlite"
    with MemoryStore.open(path, embedder=world.embedder()) as store:
        for epoch in range(2):
            world.write_epoch(store, epoch)
        TaskIndex.open(store)
    return path


def change(path, *statements: str, values: tuple = ()) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA ignore_check_constraints=ON")
        for statement in statements:
            db.execute(statement, values if "?" in statement else ())
    sum_again(path)


def sum_again(path) -> None:
    old = json.loads(path.with_name("m.sqlite.sum").read_text())
    text = json.dumps(old | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    path.with_name("m.sqlite.sum").write_text(text)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE insights SET kind = 'spell' WHERE id = 1", "row 1 of table insights has kind='spell'"),
        ("UPDATE insights SET status = '<script>' WHERE id = 1", "has status='<script>'"),
        ("UPDATE insights SET support = 'many' WHERE id = 1", "has support='many'"),
        ("UPDATE insights SET support = -1 WHERE id = 1", "has support='-1'|has support=-1"),
        ("UPDATE insights SET content = CAST(zeroblob(11000000) AS TEXT) WHERE id = 1", "has content="),
        ("UPDATE insights SET content = x'ff' WHERE id = 1", "has content="),
        ("UPDATE insights SET last_generation = -1000000000000 WHERE id = 1", "has last_generation="),
        ("UPDATE insights SET generation = 1000000000000 WHERE id = 1", "has generation="),
        ("UPDATE insights SET usefulness = 9e999 WHERE id = 1", "has usefulness="),
        ("UPDATE tasks SET embedding = x'00' WHERE id = 1", "has embedding="),
        ("UPDATE behaviours SET embedding = NULL WHERE id = 1", "row 1 of table behaviours"),
        ("UPDATE ops SET before = '{' WHERE id = (SELECT max(id) FROM ops)", "has before="),
        ("UPDATE ops SET level = 7 WHERE id = 1", "has level="),
        ("ALTER TABLE insights ADD COLUMN extra TEXT", "table insights has not the columns"),
        ("ALTER TABLE insights DROP COLUMN leak", "table insights has not the columns"),
        ("DROP TABLE audits", "table audits has not the columns"),
        ("CREATE TRIGGER t AFTER INSERT ON ops BEGIN DELETE FROM insights; END", "it has a trigger 't'"),
        ("CREATE VIEW v AS SELECT 1", "it has a view 'v'"),
        ("INSERT INTO meta VALUES ('x', 'y')", "meta has the key 'x'"),
        ("UPDATE meta SET value = '9e9' WHERE key = 'cluster_similarity'", "cluster_similarity='9e9' is no cosine"),
        ("UPDATE meta SET value = '[' WHERE key = 'embedder_state'", "its embedder cannot be read"),
        ("UPDATE meta SET value = replace(value, '512', '999999999999') WHERE key != 'embedder'", "embedder"),
        ("UPDATE meta SET value = '1000000000000' WHERE key = 'generation'", "generation"),
        ("DELETE FROM meta WHERE key = 'dimension'", "its embedder cannot be read"),
    ],
)
def test_what_no_store_of_ours_holds_is_refused(foreign, capsys, statement, words):
    change(foreign, statement)
    sentence = said(capsys, ("stats",), foreign)
    assert any(part in sentence for part in words.split("|"))
    assert said(capsys, ("rollback", "0"), foreign)


def test_a_history_that_names_other_columns_is_not_replayed(foreign, capsys):
    """Its names would become part of SQL statements."""
    change(foreign, "UPDATE ops SET before = json_object('content = 1; --', 2) WHERE action = 'change'")
    before = foreign.read_bytes()
    assert "is damaged (its history of table" in said(capsys, ("diff", "0", "2"), foreign)
    assert "is damaged (its history of table" in said(capsys, ("rollback", "1"), foreign)
    assert foreign.read_bytes() == before


def test_texts_reach_terminal_and_page_as_text(foreign, capsys):
    text = ESCAPES.replace("\ud800", "") + "<script>alert(1)</script>"
    for table, column in (("tasks", "task_id"), ("tasks", "memory_key"), ("tasks", "domain"), ("insights", "leak"),
                          ("insights", "content"), ("behaviours", "content"), ("experiences", "response"),
                          ("ops", "reason"), ("experiences", "verdict_status")):  # fmt: skip
        change(foreign, f"UPDATE {table} SET {column} = ? || id", values=(text,))
    commands = (
        ("list",), ("list", "task"), ("list", "experience"), ("list", "behaviour"), ("show", "insight", "1"),
        ("show", "experience", "1"), ("show", "task", "1"), ("search", "red 3"), ("diff", "0", "2"), ("list", "--json"),
        ("show", "insight", "1", "--json"), ("search", text), ("audit",),
    )  # fmt: skip
    for command in commands:
        assert main(["memory", command[0], str(foreign), *command[1:]]) == 0, command
        out = capsys.readouterr().out
        assert not set(out) & set("\x1b\x07\x9b\u202e"), command
        assert "\\x1b" in out or "\\u001b" in out or command[0] in ("audit", "diff"), command
    with MemoryStore.open(foreign, read_only=True) as store:
        assert "<script" not in render(store, "<script>")


def test_the_page_escapes_kind_and_status_too(foreign):
    """Were a store to get past the checks, its page would still be harmless."""
    with MemoryStore.open(foreign) as store:
        store.db.execute("PRAGMA ignore_check_constraints=ON")
        store.db.execute("UPDATE insights SET usefulness = id - 5, kind = '<script>1', status = 'active'")
        store.db.execute("UPDATE insights SET status = 'quarantined' WHERE id = 7")
        store.db.execute("UPDATE insights SET status = '<script>2' WHERE id = 2")
        page = render(store, "x")
    assert "<script" not in page
    assert page.count("&lt;script&gt;1") > 2
    assert "&lt;script&gt;2" in page


def test_a_model_that_a_store_names_is_not_loaded_to_read_the_store(foreign, capsys):
    state = json.dumps({"kind": "sentence", "path": "stranger/model"})
    change(foreign, "UPDATE meta SET value = ? WHERE key = 'embedder_state'", values=(state,))
    assert main(["memory", "list", str(foreign)]) == 0


def test_printable():
    assert printable("a\tb\nc é 中") == "a\tb\nc é 中"
    assert printable(ESCAPES).isprintable()
    assert printable("\x1b[0m\x7f\u2066") == "\\x1b[0m\\x7f\\u2066"
    again = printable_json(json.dumps([ESCAPES], ensure_ascii=False))
    assert json.loads(again) == [ESCAPES]
    assert again.isprintable()


def place_in_the_way(folder) -> dict:
    """Places where no store can be made, by the word that the sentence must have."""
    (folder / "file").write_text("x")
    (folder / "folder.sqlite").mkdir()
    (folder / "broken.sqlite").symlink_to(folder / "nowhere" / "m.sqlite")
    return {
        folder / "file" / "m.sqlite": "Not a directory|File exists",
        folder / "folder.sqlite": "unable to open",
        folder / "broken.sqlite": "unable to open",
        folder / ("x" * 300 + ".sqlite"): "File name too long",
    }


def test_a_store_that_cannot_be_made_is_one_sentence(tmp_path):
    for path, words in place_in_the_way(tmp_path).items():
        with pytest.raises(MemoryStoreError, match=words) as error:
            MemoryStore.open(path, embedder=HashEmbedder(64))
        assert "\n" not in str(error.value)
    with MemoryStore.open(tmp_path / "sound.sqlite", embedder=HashEmbedder(64)) as store:
        data = store.snapshot()
    for path in (tmp_path / "file" / "m.sqlite", tmp_path / "folder.sqlite"):
        with pytest.raises(MemoryStoreError, match="cannot be opened or written"):
            MemoryStore.restore(path, data)
    assert (tmp_path / "folder.sqlite").is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become nobody")
def test_a_closed_folder_is_named():
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)

        def act():
            with pytest.raises(MemoryStoreError, match=r"unable to open|Permission denied"):
                MemoryStore.open(Path(name) / "m.sqlite", embedder=HashEmbedder(64))

        as_nobody(act)
        Path(name).chmod(0o755)


def test_a_full_disk_at_creation_and_at_restoring_leaves_nothing_half(tmp_path, foreign):
    """A limit on file sizes stands for the disk."""
    with MemoryStore.open(foreign, read_only=True) as store:
        (tmp_path / "data").write_bytes(store.snapshot())
    script = textwrap.dedent(f"""
        import resource, signal
        from pathlib import Path
        from pmd.errors import MemoryStoreError
        from pmd.memory.embed import HashEmbedder
        from pmd.memory.store import MemoryStore
        folder = Path({str(tmp_path)!r})
        data = (folder / "data").read_bytes()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        for act in (
            lambda: MemoryStore.open(folder / "new.sqlite", embedder=HashEmbedder(64)),
            lambda: MemoryStore.restore(folder / "m.sqlite", data),
            lambda: MemoryStore.restore(folder / "other" / "m.sqlite", data),
        ):
            try:
                act()
            except MemoryStoreError as error:
                print(error)
    """)
    before = foreign.read_bytes()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 3
    assert all("cannot be opened or written" in line for line in done.stdout.splitlines())
    assert foreign.read_bytes() == before
    assert list((tmp_path / "other").iterdir()) == []
    MemoryStore.open(tmp_path / "new.sqlite", embedder=HashEmbedder(64)).close()

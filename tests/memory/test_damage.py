"""A store that was damaged, cut, mixed up or locked: found out at the next opening, said in one sentence."""

import contextlib
import json
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from command_line import run_pmd
from memory_world import World, killed_at, leave_a_log

from pmd.callbacks.memory import MemoryCallback
from pmd.cli import main
from pmd.errors import MemoryStoreError
from pmd.memory import EpochRecord, ProceduralMemory
from pmd.memory.index import TaskIndex
from pmd.memory.store import MemoryStore

READING = (
    ("stats",), ("list",), ("show", "insight", "1", "--lineage"), ("search", "red 3 zib"), ("diff", "0", "1"),
    ("audit",), ("check",), ("export", "out.jsonl"), ("report", "--out", "out.html"),
)  # fmt: skip
FAMILIES = 8
WRITING = (("rebuild",), ("rollback", "0"), ("import", "given.jsonl"))


@pytest.fixture(scope="module")
def world() -> World:
    """A smaller world than elsewhere: every test writes or reads the whole store, most of them several times."""
    return World(families=FAMILIES)


@pytest.fixture(scope="module")
def sound(tmp_path_factory, world) -> Path:
    """A folder with a store of two epochs, its checksum, its index and an export of it."""
    folder = tmp_path_factory.mktemp("sound")
    with MemoryStore.open(folder / "m.sqlite", embedder=world.embedder()) as store:
        for epoch in range(2):
            world.write_epoch(store, epoch)
        TaskIndex.open(store)
    assert main(["memory", "export", str(folder / "m.sqlite"), str(folder / "given.jsonl")]) == 0
    return folder


@pytest.fixture
def copy(sound, tmp_path, monkeypatch) -> Path:
    shutil.copytree(sound, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy" / "m.sqlite"


def said(capsys, command: tuple[str, ...], store: Path, code: int = 1) -> str:
    """Run one subcommand that must fail; return its sentence."""
    capsys.readouterr()
    assert main(["memory", command[0], str(store), *command[1:]]) == code
    error = capsys.readouterr().err
    assert error.startswith("MemoryStoreError: ")
    assert error.count("\n") == 1
    return error


def test_the_sound_store_passes_every_command(copy, capsys):
    for command in READING:
        assert main(["memory", command[0], str(copy), *command[1:]]) == 0, command
    assert sorted(path.name for path in copy.parent.iterdir() if path.name[-4:] not in ("-shm", "-wal")) == [
        "given.jsonl", "m.sqlite", "m.sqlite.sum", "out.html", "out.jsonl", "tasks.hnsw", "tasks.json",
    ]  # fmt: skip
    for command in WRITING:
        assert main(["memory", command[0], str(copy), *command[1:]]) == 0, command


@pytest.mark.parametrize("seed", range(25))
def test_a_flipped_bit_anywhere_is_found(copy, capsys, seed):
    """SQLite itself notices damaged pages, and no flip in a text, a number or a vector."""
    draw, data = random.Random(seed), bytearray(copy.read_bytes())
    at = draw.randrange(len(data))
    data[at] ^= 1 << draw.randrange(8)
    copy.write_bytes(data)
    for command in (READING[seed % len(READING)], WRITING[seed % len(WRITING)]):
        assert "damaged" in said(capsys, command, copy)
    assert copy.read_bytes() == data


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"\0" * 4096,
        lambda data: data[:50],
        lambda data: b"\0" * len(data),
        lambda data: data[:8192] + b"\0" * 4096 + data[12288:],
        lambda data: data[4096:] + data[:4096],
    ],
)
def test_a_cut_or_blanked_file_is_found(copy, capsys, harm):
    copy.write_bytes(harm(copy.read_bytes()))
    for command in (*READING, *WRITING):
        assert "m.sqlite" in said(capsys, command, copy)


def test_an_empty_file_is_no_store(copy, capsys):
    copy.write_bytes(b"")
    assert "m.sqlite" in said(capsys, ("stats",), copy)


def test_without_a_checksum_sqlite_is_still_asked_and_no_command_breaks(copy, capsys):
    copy.with_name("m.sqlite.sum").unlink()
    assert main(["memory", "stats", str(copy)]) == 0
    draw, whole = random.Random(0), copy.read_bytes()
    for n in range(12):
        data = bytearray(whole)
        for _ in range(30):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        copy.write_bytes(data)
        for command in (READING[n % len(READING)], ("diff", "0", "2"), WRITING[n % len(WRITING)]):
            assert main(["memory", command[0], str(copy), *command[1:]]) in (0, 1)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"generation": "x", "sha256": 3}', "\x00"])
def test_an_unreadable_checksum_counts_as_none(copy, world, text):
    copy.with_name("m.sqlite.sum").write_text(text)
    with MemoryStore.open(copy, embedder=world.embedder()) as store:
        world.write_epoch(store, 2)
    assert '"generation": 3' in copy.with_name("m.sqlite.sum").read_text()


def test_a_store_of_another_generation_than_its_checksum(copy, capsys, world, tmp_path):
    """An older file under a newer checksum has lost what was written since; a newer one is only not yet summed."""
    shutil.copy(copy, tmp_path / "old")
    shutil.copy(copy.with_name("m.sqlite.sum"), tmp_path / "old.sum")
    with MemoryStore.open(copy, embedder=world.embedder()) as store:
        world.write_epoch(store, 2)
    newer = copy.read_bytes()
    shutil.copy(tmp_path / "old", copy)
    assert "is at generation=2 and was at 3" in said(capsys, ("stats",), copy)
    copy.write_bytes(newer)
    shutil.copy(tmp_path / "old.sum", copy.with_name("m.sqlite.sum"))
    assert main(["memory", "stats", str(copy)]) == 0


def test_a_log_left_behind_is_read(copy, world):
    leave_a_log(copy, 2, FAMILIES)
    with MemoryStore.open(copy, embedder=world.embedder()) as store:
        assert store.generation == 3
        world.write_epoch(store, 3)
    assert not copy.with_name("m.sqlite-wal").exists()
    with MemoryStore.open(copy, read_only=True) as store:
        assert store.generation == 4


def test_a_flipped_generation_is_found_with_and_without_a_checksum(copy, capsys):
    """Raised or lowered, by any bit of the number or of its check word."""
    db = sqlite3.connect(copy, isolation_level=None)
    summed = copy.with_name("m.sqlite.sum").read_bytes()
    for key, value in db.execute("SELECT key, value FROM meta WHERE key LIKE 'generation%'").fetchall():
        for bit in range(8 * len(value)):
            data = bytearray(value.encode())
            data[bit // 8] ^= 1 << bit % 8
            db.execute("UPDATE meta SET value = CAST(? AS TEXT) WHERE key = ?", (bytes(data), key))
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            copy.with_name("m.sqlite.sum").unlink(missing_ok=True)
            with pytest.raises(MemoryStoreError, match="generation"):
                MemoryStore.open(copy, read_only=True)
            if bit % 8 == 0:
                copy.with_name("m.sqlite.sum").write_bytes(summed)
                assert "m.sqlite" in said(capsys, ("check",), copy)
        db.execute("UPDATE meta SET value = ? WHERE key = ?", (value, key))
    db.close()


def test_a_flipped_bit_in_any_column_is_found(copy, capsys):
    """Even where SQLite itself rewrote the page, so that nothing but the checksum can tell."""
    whole = copy.read_bytes()
    db = sqlite3.connect(copy)
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = [(table, row[1]) for table in tables for row in db.execute(f"PRAGMA table_info({table})")]
    db.close()
    assert len(columns) > 60
    num_flipped = 0
    for number, (table, column) in enumerate(columns):
        copy.write_bytes(whole)
        num_flipped += flip_in_column(copy, table, column, random.Random(number))
        if copy.read_bytes() != whole:
            assert "damaged" in said(capsys, READING[number % len(READING)], copy), (table, column)
    assert num_flipped > 50


def flip_in_column(path: Path, table: str, column: str, draw: random.Random) -> bool:
    """Flip one bit of one value of a column, if there is any; return whether it was possible."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA ignore_check_constraints=ON")
    found = db.execute(f"SELECT {column} FROM {table} WHERE length({column}) > 0 ORDER BY 1 DESC LIMIT 1").fetchone()
    if found is not None:
        (value,) = found
        data = bytearray(struct.pack("<d", value) if isinstance(value, float) else str(value).encode())
        if isinstance(value, bytes):
            data = bytearray(value)
        data[draw.randrange(len(data))] ^= 1
        flipped = bytes(data) if isinstance(value, bytes) else data.decode("utf-8", "replace")
        flipped = struct.unpack("<d", data)[0] if isinstance(value, float) else flipped
        flipped = value ^ 1 if isinstance(value, int) else flipped
        with contextlib.suppress(sqlite3.IntegrityError):
            db.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (flipped, value))
    changed = found is not None and db.total_changes > 0
    db.close()
    return changed


def test_killed_between_commit_and_checksum_the_log_is_the_store(copy, world):
    killed_at(copy, "PRAGMA wal_checkpoint", 2, FAMILIES)
    with MemoryStore.open(copy, read_only=True) as reader:
        assert reader.generation == 3
    with MemoryStore.open(copy, embedder=world.embedder()):
        pass
    assert '"generation": 3' in copy.with_name("m.sqlite.sum").read_text()  # the next writer has summed it
    assert main(["memory", "rebuild", str(copy)]) == 0
    assert main(["memory", "check", str(copy)]) == 0


def test_a_log_lost_between_commit_and_checksum_is_found(copy, capsys):
    killed_at(copy, "PRAGMA wal_checkpoint", 2, FAMILIES)
    for suffix in ("-wal", "-shm"):
        copy.with_name(f"m.sqlite{suffix}").unlink()
    for command in (("stats",), ("check",), ("rollback", "0")):
        assert "was being written to generation=3, and its write-ahead log was lost" in said(capsys, command, copy)


@pytest.mark.parametrize(
    "harm", [lambda log: log.write_bytes(b""), lambda log: log.write_bytes(log.read_bytes()[:5000])]
)
def test_a_log_damaged_between_commit_and_checksum_is_found(copy, capsys, harm):
    """To the store alone, this looks as if the update had never been committed."""
    killed_at(copy, "PRAGMA wal_checkpoint", 2, FAMILIES)
    harm(copy.with_name("m.sqlite-wal"))
    copy.with_name("m.sqlite-shm").unlink()
    assert main(["memory", "check", str(copy)]) == 1
    assert "generation 3 was being written" in " ".join(capsys.readouterr().out.split())


def test_killed_before_the_commit_nothing_is_lost_and_check_tells(copy, capsys, world):
    killed_at(copy, "COMMIT", 2, FAMILIES)
    assert main(["memory", "stats", str(copy)]) == 0  # a reader leaves all as it is
    assert main(["memory", "check", str(copy)]) == 1
    assert "generation 3 was being written" in " ".join(capsys.readouterr().out.split())
    with MemoryStore.open(copy, embedder=world.embedder()) as store:
        assert store.generation == 2
    assert main(["memory", "check", str(copy)]) == 0


def flip_in_the_middle(log: Path) -> None:
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    log.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [
        lambda log: log.unlink(),
        lambda log: log.write_bytes(b""),
        lambda log: log.write_bytes(log.read_bytes()[:5000]),
        lambda log: log.write_bytes(os.urandom(9000)),
        flip_in_the_middle,
    ],
)
def test_a_lost_or_damaged_log_is_found(copy, capsys, harm):
    log = leave_a_log(copy, 2, FAMILIES)
    harm(log)
    copy.with_name("m.sqlite-shm").unlink(missing_ok=True)
    for command in (("stats",), ("rollback", "0")):
        assert "its write-ahead log was lost" in said(capsys, command, copy)


def test_after_each_update_the_file_alone_is_the_store(copy, world, tmp_path):
    with MemoryStore.open(copy, embedder=world.embedder()) as store:
        world.write_epoch(store, 2)
        (tmp_path / "alone.sqlite").write_bytes(copy.read_bytes())
        with MemoryStore.open(tmp_path / "alone.sqlite", read_only=True) as alone:
            assert alone.generation == store.generation == 3
            assert alone.insights() == store.insights()


def test_the_remedy_works(copy, world):
    """Move the damaged file away and resume: the run's checkpoint brings the memory back."""
    with MemoryStore.open(copy, embedder=world.embedder()) as store:
        kept, data = store.insights(), store.snapshot()
        keys = [task.memory_key for task in world.tasks]
    copy.rename(copy.with_name("damaged.sqlite"))
    copy.with_name("m.sqlite.sum").rename(copy.with_name("damaged.sqlite.sum"))
    memory = ProceduralMemory(copy, store.config, keys, frozenset())
    memory.restore(data)
    assert memory.store.insights() == kept
    memory.close()


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(copy, world):
    with MemoryStore.open(copy, embedder=world.embedder()) as store:
        keys = [task.memory_key for task in world.tasks]
        config = store.config
    memory = ProceduralMemory(copy, config, keys, frozenset())
    callback = MemoryCallback(EpochRecord(), memory, None, copy.parent / "items")  # type: ignore[arg-type]
    state = callback.state_dict()
    callback.load_state_dict(state)
    kept = memory.store.insights()
    place = state["database"].numpy().tobytes().index(b"use ")  # in a text, where SQLite would not notice
    state["database"][place] ^= 1
    with pytest.raises(MemoryStoreError, match="checkpoint's memory is damaged"):
        callback.load_state_dict(state)
    assert memory.store.insights() == kept
    memory.close()


def as_nobody(act):
    """Run `act` without root's right to write everywhere; skipped where that cannot be."""
    if os.geteuid() != 0:
        return act()
    os.seteuid(65534)
    try:
        return act()
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("log", [False, True])
def test_a_read_only_folder_can_be_read_and_refuses_writing(sound, capsys, log):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name, "run")
        shutil.copytree(sound, folder)
        store = folder / "m.sqlite"
        if log:
            leave_a_log(store, 2, FAMILIES)
        for path in (*folder.iterdir(), folder, Path(name)):
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            for command in (("stats",), ("list",), ("search", "red 3 zib"), ("check",)):
                arguments = ["memory", command[0], str(store), *command[1:]]
                assert as_nobody(lambda arguments=arguments: main(arguments)) == 0, command
            for command in (("rollback", "0"), ("import", str(folder / "given.jsonl"))):
                sentence = as_nobody(lambda command=command: said(capsys, command, store))
                assert "permission" in sentence
        finally:
            Path(name).chmod(0o755)
            folder.chmod(0o755)


def test_a_folder_without_room(copy):
    """A limit on file sizes stands for a full disk, through the command line."""
    before = copy.read_bytes()
    limit = 1024 * (len(before) // 1024 // 8)  # room for the export, none for the store's next generation
    copy.with_name("tasks.hnsw").unlink()
    refused = {
        ("rollback", "0"): "could not be written",
        ("export", "out.jsonl", "--experiences"): "free disk space",
        ("report", "--out", "out.html"): "free disk space",
        ("rebuild",): "could not be written whole",
    }
    script = textwrap.dedent(f"""
        import contextlib, io, json, resource
        from pmd.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        for command in {[list(command) for command in refused]!r}:
            with contextlib.redirect_stderr(io.StringIO()) as error:
                code = main(["memory", command[0], {str(copy)!r}, *command[1:]])
            print(json.dumps([code, error.getvalue()]))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    for (code, sentence), words in zip(told, refused.values(), strict=True):
        assert code == 1
        assert words in sentence
        assert sentence.count("\n") == 1
    assert copy.read_bytes() == before
    assert main(["memory", "rebuild", str(copy)]) == 0
    assert main(["memory", "check", str(copy)]) == 0


def test_the_real_command_line_says_one_sentence(copy):
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 4
    copy.write_bytes(data)
    done = run_pmd("memory", "list", str(copy), "--json", code=1)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"MemoryStoreError: memory store={copy} is damaged")
    assert "--ckpt_path=last" in done.stderr

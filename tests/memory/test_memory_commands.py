"""`pmd memory` shows what a store holds and changes nothing unless it says so."""

import json

import pytest

from pmd.cli.memory import main
from pmd.errors import MemoryStoreError
from pmd.memory.store import MemoryStore


@pytest.fixture
def run_directory(grown, tmp_path):
    MemoryStore.restore(tmp_path / "run" / "memory" / "memory.sqlite", grown.snapshot())
    return tmp_path / "run"


def test_command_takes_a_run_or_a_file_and_changes_nothing(run_directory, world, capsys):
    path = run_directory / "memory" / "memory.sqlite"
    before = path.read_bytes()
    for store in (run_directory, path):
        assert main(["stats", str(store), "--json"]) == 0
        facts = {row["quantity"]: row["value"] for row in json.loads(capsys.readouterr().out)["memory"]}
        assert facts["tasks"] == 192
        assert facts["generation"] == 3
    assert main(["list", str(run_directory), "--kind", "strategy", "--limit", "3", "--json"]) == 0
    (rows,) = json.loads(capsys.readouterr().out).values()
    assert len(rows) == 3
    assert all(row["kind"] == "strategy" for row in rows)
    name = world.names[5]
    assert main(["search", str(run_directory), world.key(name), "-k", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["text"].split()[1] for row in found["a teacher would be shown"]} == {name}
    assert found["nearest training tasks"][0]["text"].endswith(name)
    for what in ("task", "experience", "insight", "behaviour"):
        assert main(["list", str(run_directory), what, "--status", "all", "--limit", "2"]) == 0
        assert main(["show", str(run_directory), what, "1"]) == 0
    assert f"use {world.names[0]}" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert not (path.parent / "tasks.hnsw").exists()


def test_command_errors(run_directory, tmp_path):
    with pytest.raises(MemoryStoreError, match="insight=99999 is not in the store"):
        main(["show", str(run_directory), "insight", "99999"])
    with pytest.raises(MemoryStoreError, match=r"memory.sqlite does not exist"):
        main(["stats", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        main(["nonsense"])
    assert exit_.value.code == 2

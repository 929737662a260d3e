"""A run that begins with another's memory: it is used from the first step on, and resuming equals never stopping."""

import csv
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from command_line import run_pmd, small_fit

AUDITS = "--memory.audit_groups=8"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A run of its own seed, and its export."""
    run_dir = tmp_path_factory.mktemp("source") / "run"
    small_fit(run_dir, 2, AUDITS)
    run_pmd("memory", "export", str(run_dir), str(run_dir / "memory.jsonl"))
    return run_dir


@pytest.fixture(scope="module")
def whole(source) -> Path:
    """Two epochs that begin with the export; the learning rate stands for another policy."""
    run_dir = source.with_name("whole")
    small_fit(run_dir, 2, AUDITS, "--optimizer.lr=1e-3", f"--memory.import_path={source / 'memory.jsonl'}")
    return run_dir


def dump(run_dir: Path) -> list[str]:
    db = sqlite3.connect(run_dir / "memory" / "memory.sqlite")
    content = list(db.iterdump())
    db.close()
    return content


def hit_rates(run_dir: Path) -> list[float]:
    with (run_dir / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row["memory/hit_rate"]) for row in csv.DictReader(file) if row.get("memory/hit_rate")]


def test_imported_memory_is_shown_from_the_first_step(source, whole):
    assert hit_rates(source)[0] == 0.0
    assert hit_rates(whole)[0] == 1.0
    found = dump(whole)
    assert any("'import'" in line for line in found if 'INSERT INTO "ops"' in line)
    assert any("'reflection'" in line for line in found if 'INSERT INTO "ops"' in line)  # and it grows


def test_resuming_equals_never_stopping_and_retrieves_alike(source, whole, tmp_path):
    """The second half imports nothing: the checkpoint holds the memory, and the export may be gone by then."""
    run_dir, export = tmp_path / "run", tmp_path / "memory.jsonl"
    shutil.copy(source / "memory.jsonl", export)
    arguments = (AUDITS, "--optimizer.lr=1e-3", f"--memory.import_path={export}")
    small_fit(run_dir, 1, *arguments)
    export.unlink()
    small_fit(run_dir, 2, *arguments, "--ckpt_path=last")
    assert dump(run_dir) == dump(whole)
    assert (run_dir / "memory" / "tasks.hnsw").read_bytes() == (whole / "memory" / "tasks.hnsw").read_bytes()
    one, two = (torch.load(d / "checkpoints/last.ckpt", weights_only=False)["state_dict"] for d in (whole, run_dir))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    found = [
        run_pmd("memory", "search", str(d), "red 3 blue 5 green 1 gold 7", "--json").stdout for d in (run_dir, whole)
    ]
    assert found[0] == found[1]


def test_a_closed_import_is_never_written(source, tmp_path):
    run_dir = tmp_path / "run"
    small_fit(run_dir, 1, AUDITS, f"--memory.import_path={source / 'memory.jsonl'}", "--memory.frozen=true")
    assert hit_rates(run_dir) == [1.0]
    assert "audit/num_audits" in (source / "metrics.csv").read_text()
    assert "audit/num_audits" not in (run_dir / "metrics.csv").read_text()  # nothing could come of it
    facts = run_pmd("memory", "stats", str(run_dir)).stdout
    assert [line.split()[-1] for line in facts.splitlines() if "generation" in line] == ["1"]

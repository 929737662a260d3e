"""A real sweep with a run that works and one that fails; then the same again, and a changed grid."""

import json
import subprocess
from pathlib import Path

import pytest
from command_line import run_pmd

from pmd.cli import main
from pmd.planning.sweep.grid import plan
from pmd.planning.sweep.launch import unfinished

GRID = """
base: configs/tiny.yaml
seeds: [5]
settings:
  trace_every: 0
  trainer.max_epochs: 1
  data.world.families: 4
  data.world.train_per_family: 2
  data.world.test_per_family: 2
  verification.samples: 1
  verification.final_samples: 2
  verification.pass_at: [1, 2]
blocks:
  - arms:
      PMD: {}
      fails: {settings: {memory.import_path: FOLDER/no_export.jsonl}}
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("sweep")
    grid = folder / "grid.yaml"
    (folder / "no_export.jsonl").write_text('{"format": "another"}\n')
    grid.write_text(GRID.replace("FOLDER", str(folder)))
    return grid, folder / "out", run_pmd("sweep", str(grid), "--out", str(folder / "out"), "--jobs", "2", code=1)


def test_a_failed_run_is_kept_and_reported(swept):
    _, out, done = swept
    assert "fails, seed 5 ended with exit code 1" in " ".join(done.stdout.split())
    assert "no_export.jsonl" in (out / "fails" / "seed-5.log").read_text()
    rows = {row["label"]: row for row in json.loads((out / "sweep.json").read_text())}
    assert rows["PMD"]["num_seeds"] == 1
    assert rows["fails"]["num_failed"] == 1
    assert (out / "sweep.png").stat().st_size > 5_000
    assert "| PMD |" in (out / "table.md").read_text()


def test_the_base_row_is_the_policy_before_training(swept):
    _, out, _ = swept
    results = json.loads((out / "PMD" / "seed-5" / "results.json").read_text())
    rows = {row["label"]: row for row in json.loads((out / "sweep.json").read_text())}
    assert rows["base"]["quantities"]["avg"]["mean"] == results["phases"]["initial"]["avg"]
    assert rows["PMD"]["quantities"]["avg"]["mean"] == results["phases"]["last"]["avg"]


def test_only_the_failed_run_is_repeated(swept):
    grid, out, _ = swept
    assert [run.arm for run in unfinished(plan(grid, out))] == ["fails"]


def test_a_finished_sweep_makes_its_table_and_repeats_no_run(swept, capsys):
    grid, out, _ = swept
    finished, results = grid.with_name("finished.yaml"), out / "PMD" / "seed-5" / "results.json"
    finished.write_text(grid.read_text().split("      fails:")[0])
    before = results.stat().st_mtime_ns
    (out / "table.md").unlink()
    assert main(["sweep", str(finished), "--out", str(out), "--jobs", "2"]) == 0
    assert "1 runs, 1 of them done" in capsys.readouterr().out
    assert "| PMD |" in (out / "table.md").read_text()
    assert results.stat().st_mtime_ns == before


def test_runs_of_another_configuration_are_refused(swept, capsys):
    grid, out, _ = swept
    changed = grid.with_name("changed.yaml")
    changed.write_text(grid.read_text().replace("max_epochs: 1", "max_epochs: 2"))
    assert main(["sweep", str(changed), "--out", str(out)]) == 2
    assert "trainer.max_epochs=2 (was 1)); remove them" in capsys.readouterr().err.replace("\n", " ")

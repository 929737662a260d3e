"""A sweep's runs as SLURM jobs: what sbatch is asked for, and, with submitit's local executor, jobs that are killed."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from command_line import ROOT
from small_sweep import SMALL

from pmd.errors import ConfigError
from pmd.planning.sweep.attempt import Attempt, log_file
from pmd.planning.sweep.grid import PlannedRun, plan
from pmd.planning.sweep.launch import launch
from pmd.planning.sweep.on_slurm import Slurm

pytest.importorskip("submitit", reason="needs submitit: pip install 'pmd[slurm]'")

GRID = f"""
base: {ROOT}/configs/tiny.yaml
seeds: [0, 1]
settings:
{SMALL}blocks:
  - arms: {{PMD: {{}}}}
"""


def test_sbatch_is_asked_for_what_a_run_needs(tmp_path, monkeypatch):
    for name in ("srun", "sbatch"):  # sbatch keeps the script that submitit writes
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/script\necho Submitted batch job 12\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    trainer = json.dumps({"trainer": {"strategy": "ddp", "devices": 8, "accelerator": "gpu"}})
    run = PlannedRun("", "PMD", (), 0, (), tmp_path / "PMD" / "seed-0", trainer)
    slurm = Slurm(1, tmp_path / "slurm", {"partition": "gpu", "time": "720", "mem": "200G"})
    slurm.start(Attempt(run, 0, str(tmp_path), threads=2))
    asked = set(re.findall(r"#SBATCH --(\S+)", (tmp_path / "script").read_text()))
    assert {
        "partition=gpu", "time=720", "mem=200G", "gpus-per-node=8", "cpus-per-task=16", "ntasks-per-node=1", "nodes=1",
    } <= asked  # fmt: skip


def test_what_cannot_be_submitted_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--slurm time=12h must be a whole number of minutes"):
        Slurm(1, tmp_path, {"time": "12h"})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"--on=slurm cannot be used here.*run it where sbatch works"):
        Slurm(1, tmp_path, {})


def kill_when_it_trains(run: PlannedRun, which: str) -> None:
    """Kill the run's process, or its job with it, once it has saved a checkpoint."""
    while not (run.run_dir / "checkpoints" / "last.ckpt").is_file():
        time.sleep(0.05)
    found = re.match(r"process (\d+) on ", (run.run_dir / ".lock").read_text())
    assert found is not None
    pid = int(found[1])
    if which == "job":
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_jobs_go_on(tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID)
    runs = plan(grid, tmp_path / "out")
    for run, which in zip(runs, ("process", "job"), strict=True):
        threading.Thread(target=kill_when_it_trains, args=(run, which), daemon=True).start()
    outcomes = list(launch(runs, Slurm(2, tmp_path / "slurm", {}, cluster="local"), threads=1, retries=2))
    assert [outcome.code for outcome in outcomes if outcome.retries_left is not None] == [-9, -9]
    assert [outcome.code for outcome in outcomes if outcome.retries_left is None] == [0, 0]
    for run in runs:
        assert run.results.is_file()
        assert log_file(run).read_text().count("Resumed from ") == 1

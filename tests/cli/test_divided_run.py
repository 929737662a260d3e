"""`pmd fit` with weights divided between two processes, resumed by one: the run that one process makes alone."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    "--data.max_train=8",
    "--data.max_validation=4",
    "--data.max_test=4",
    "--rollouts.tasks_per_step=4",
    "--rollouts.group_size=4",
    "--verification.samples=2",
    "--verification.final_samples=8",
    "--memory.audit_groups=2",
    "--memory.audit_evidence=2",
]
DIVIDED = ("--trainer.strategy=fsdp2", "--trainer.devices=2")


def pmd(*arguments: object) -> None:
    command = [sys.executable, "-m", "pmd", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def found_in(run: Path) -> tuple[dict, dict]:
    """Return the scores of a run, and what its memory holds."""
    phases = json.loads((run / "results.json").read_text())["phases"]
    with sqlite3.connect(run / "memory" / "memory.sqlite") as store:
        memory = {table: store.execute(f"select * from {table}").fetchall() for table in ("experiences", "insights")}
    return phases, memory


@pytest.mark.slow
def test_a_divided_run_is_resumed_by_one_process_and_exported(tmp_path):
    alone, divided = tmp_path / "alone", tmp_path / "divided"
    fit = ("fit", "--config", "configs/tiny.yaml", *SMALL)
    pmd(*fit, f"--run_dir={alone}", "--trainer.max_epochs=2")
    pmd(*fit, f"--run_dir={divided}", "--trainer.max_epochs=1", *DIVIDED)
    assert len(list((divided / "checkpoints").glob("*.shards/shard-*"))) == 2
    pmd(*fit, f"--run_dir={divided}", "--trainer.max_epochs=2", "--ckpt_path=last")
    assert found_in(divided) == found_in(alone)
    assert found_in(alone)[1]["insights"]

    again = tmp_path / "again"
    pmd(*fit, f"--run_dir={again}", "--trainer.max_epochs=1", *DIVIDED)
    pmd("export", again, "--out", tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").is_file()

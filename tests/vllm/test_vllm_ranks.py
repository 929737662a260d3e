"""Two ranks with vLLM in each: the run that one process makes alone, whichever way weights are held and handed over."""

import json
import sqlite3
from pathlib import Path

import pytest
from command_line import run_pmd
from test_vllm_fit import TINY
from vllm_runs import metrics

pytestmark = pytest.mark.vllm
#: The teacher writes reflections, so its weights are loaded as well; audits let the trainer score meanwhile.
FULL = [
    "--model.finetune=full", "--teacher.kind=ema", "--reflection.by=teacher", "--memory.audit_groups=2",
    "--memory.audit_evidence=2",
]  # fmt: skip


def found_in(run: Path) -> tuple[dict, list, list]:
    """Return the scores of a run, and the texts that its memory holds: numbers of audits differ by rounding."""
    phases = json.loads((run / "results.json").read_text())["phases"]
    with sqlite3.connect(run / "memory" / "memory.sqlite") as store:
        attempts = store.execute("select rollout_id, response, reward, support, status from experiences").fetchall()
        insights = store.execute("select task_row, kind, content, support, status from insights").fetchall()
    return phases, attempts, insights


@pytest.mark.parametrize(
    ("strategy", "extra"), [("ddp", ["--model.finetune=lora", "--teacher.kind=ema"]), ("fsdp2", FULL)]
)
def test_two_ranks_with_an_engine_each_make_the_run_of_one(tmp_path, strategy, extra):
    alone, both = tmp_path / "alone", tmp_path / "both"
    run_pmd("fit", *TINY, *extra, f"--run_dir={alone}")
    run_pmd("fit", *TINY, *extra, f"--run_dir={both}", f"--trainer.strategy={strategy}", "--trainer.devices=2")
    assert found_in(both) == found_in(alone)
    assert all(found_in(both))
    assert 0 < max(metrics(both, "parity/max")) <= 1e-4
    assert max(metrics(both, "sampling/engine_gap")) <= 1e-4
    assert metrics(both, "time/sum_gradients_s")

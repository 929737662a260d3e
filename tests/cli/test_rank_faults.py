"""One of two ranks fails where nothing but its own words can say why, or is told to stop before the first step."""

import json
import os
import subprocess
import sys

import pytest
from command_line import ROOT, SMALL

pytestmark = pytest.mark.slow
FAULT = """
import os, signal
from lightning import Callback

class AtNextRollouts(Callback):
    def __init__(self, hook, fault):
        if os.environ["RANK"] == "1":
            setattr(self, hook, lambda trainer, module: setattr(trainer.datamodule.engine, "generate", self._fail))
        self.fault = fault

    def _fail(self, *_):
        if self.fault == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("injected")
        yield
"""


def fit(tmp_path, hook: str, fault: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "faults.py").write_text(FAULT)
    callbacks = [{"class_path": "faults.AtNextRollouts", "init_args": {"hook": hook, "fault": fault}}]
    command = [sys.executable, "-m", "pmd", "fit", "--config", "configs/tiny.yaml", *SMALL, f"--run_dir={tmp_path}/run"]
    command += ["--trainer.strategy=ddp", "--trainer.devices=2", f"--trainer.callbacks={json.dumps(callbacks)}"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)


def test_a_rank_says_what_it_could_not_evaluate(tmp_path):
    """Training is over; the first rank reports what there is, and does not know why it lost the other one."""
    done = fit(tmp_path, "on_train_end", "ValueError")
    assert done.returncode == 1, done.stderr
    assert "ValueError: injected (traceback in " in done.stderr
    assert 'raise ValueError("injected")' in (tmp_path / "run" / "error.log").read_text()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "has lost another rank" in results["problems"][0]
    assert "initial" in results["phases"]


def test_a_rank_that_is_told_to_stop_before_the_first_step_stops_at_once(tmp_path):
    done = fit(tmp_path, "on_fit_start", "SIGTERM")
    assert done.returncode == 130, done.stderr
    assert "stopped in the first epoch" in done.stderr
    assert "ValueError" not in done.stderr

"""Trainer and vLLM on one base, with the real vLLM: nothing is copied, every sync is checked, adapters are trained."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run_pmd
from questions import make_questions
from vllm_runs import metrics

from pmd.bootstrap.random_model import make_random_model

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("architecture", ["qwen3", "olmo3"])
def test_trainer_and_vllm_compute_with_one_base(tmp_path, architecture):
    model = make_random_model(tmp_path / "model", architecture)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharing.py")), str(model)],
        capture_output=True, text=True, timeout=550, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    assert done.stdout.splitlines()[-1] == "one base"


@pytest.mark.parametrize("share", ["auto", "true"])
def test_where_vllm_repacks_its_weights_each_holds_a_copy_or_the_run_is_refused(tmp_path, share):
    model = make_random_model(tmp_path / "model")
    done = run_pmd(
        "fit", "--config", "configs/qwen3_8b.yaml", "--config", "configs/overlays/cpu_vllm.yaml",
        f"--model.path={model}", f"--data.path={make_questions(tmp_path, 24)}", f"--run_dir={tmp_path / 'run'}",
        f"--rollouts.vllm.share_weights={share}", "--trainer.max_epochs=1", code=0 if share == "auto" else 2,
    )  # fmt: skip
    if share == "auto":
        assert "Trainer and vLLM each hold a copy of the base: vLLM's CPU build repacks its weights." in done.stdout
        assert max(metrics(tmp_path / "run", "parity/max")) <= 1e-4
    else:
        assert "rollouts.vllm.share_weights=true: vLLM holds no plain copy" in done.stderr
        assert "set it to false" in done.stderr

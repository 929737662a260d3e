"""vLLM in the training process on a GPU: one base, sleep and wake, whole runs, and their resumption."""

import csv
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gpu_model import make_gpu_model
from questions import make_questions

ROOT = Path(__file__).parents[2]
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
#: A shipped configuration at a tiny size, on the GPU.
RUN = [
    "--config", "configs/qwen3_8b.yaml", "--config", "configs/overlays/cpu_vllm.yaml", "--trainer.accelerator=gpu",
    "--model.dtype=bfloat16", "--teacher.kind=ema", "--rollouts.vllm.enforce_eager=true", "--rollouts.vllm.sleep=true",
    "--rollouts.vllm.memory_fraction=0.1", "--rollouts.vllm.block_size=null", "--rollouts.vllm.parity_bound=0.05",
]  # fmt: skip


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-6000:]}"
    return done.stdout


def metrics(run_dir: Path, name: str) -> list[float]:
    return [float(row[name]) for row in csv.DictReader((run_dir / "metrics.csv").open()) if row.get(name)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_gpu_model(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_questions(tmp_path_factory.mktemp("data"), 24)


@needs_vllm
def test_one_base_sleeps_wakes_and_syncs(model):
    """In a process of its own, because vLLM keeps the GPU: see gpu_sharing.py."""
    assert run(str(Path(__file__).with_name("gpu_sharing.py")), str(model)).splitlines()[-1] == "one base"


@needs_vllm
def test_two_epochs_and_their_resumption(model, data, tmp_path):
    run_dir, arguments = tmp_path / "run", [*RUN, f"--model.path={model}", f"--data.path={data}"]
    output = run("-m", "pmd", "fit", *arguments, "--trainer.max_epochs=2", f"--run_dir={run_dir}")
    assert "one base with the trainer" in output
    assert "hold a copy" not in output
    assert json.loads((run_dir / "results.json").read_text())["updates"] == 4
    assert len(metrics(run_dir, "parity/max")) == 4
    assert max(metrics(run_dir, "parity/mean")) <= 0.05
    assert min(metrics(run_dir, "time/sleep_s")) > 0
    assert max(metrics(run_dir, "time/sync_s")[1:]) < 5
    run("-m", "pmd", "fit", *arguments, "--trainer.max_epochs=3", f"--run_dir={run_dir}", "--ckpt_path=last")
    assert json.loads((run_dir / "results.json").read_text())["updates"] == 6
    state = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    assert all(".student." in name or ".teacher." in name for name in state)

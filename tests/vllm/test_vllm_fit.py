"""The whole `fit` with vLLM as its engine: two epochs, an adapter and all weights; and the shipped configurations."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pmd.bootstrap.random_model import make_random_model

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]
CPU = ["--rollouts.engine=vllm", "--rollouts.vllm.kv_cache_memory_bytes=33554432", "--rollouts.vllm.block_size=32"]
TINY = [
    "--config", "configs/tiny.yaml", *CPU, "--rollouts.vllm.parity_bound=1e-4", "--trainer.max_epochs=2",
    "--data.world.families=6", "--data.world.train_per_family=2", "--data.world.test_per_family=1",
    "--rollouts.problems_per_step=6", "--verification.final_samples=8", "--verification.samples=2",
]  # fmt: skip


def pmd(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pmd", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=550,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def metrics(run_dir: Path, name: str) -> list[float]:
    rows = csv.DictReader((run_dir / "metrics.csv").open())
    return [float(row[name]) for row in rows if row.get(name)]


@pytest.mark.parametrize("extra", [["--model.finetune=full"], ["--model.finetune=lora", "--teacher.kind=ema"]])
def test_two_epochs(tmp_path, extra):
    run_dir = tmp_path / "run"
    output = pmd("fit", *TINY, *extra, f"--run_dir={run_dir}")
    assert "vLLM is ready" in output
    results = json.loads((run_dir / "results.json").read_text())
    assert results["updates"] == 4
    assert {"initial", "last"} <= set(results["phases"])
    gaps = metrics(run_dir, "parity/max")
    assert len(gaps) == 4
    assert 0 < max(gaps) <= 1e-4
    assert max(metrics(run_dir, "sampling/engine_gap")) <= 1e-4
    assert min(metrics(run_dir, "time/sync_s")) > 0
    assert max(metrics(run_dir, "memory/insights")) > 0


@pytest.mark.parametrize(
    ("config", "architecture"), [("qwen3_8b", "qwen3"), ("qwen3_8b_qlora", "qwen3"), ("olmo3_7b", "olmo3")]
)
def test_a_gpu_configuration_runs_on_the_cpu_at_a_tiny_shape(tmp_path, config, architecture):
    model = make_random_model(tmp_path / "model", architecture)
    data = write_chemistry(tmp_path / "data")
    pmd(
        "fit", "--config", f"configs/{config}.yaml", "--config", "configs/overlays/cpu_vllm.yaml",
        f"--model.path={model}", f"--data.path={data}", f"--run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert json.loads((tmp_path / "run" / "results.json").read_text())["updates"] == 4
    assert max(metrics(tmp_path / "run", "parity/max")) <= 1e-4


def write_chemistry(folder: Path) -> Path:
    """Write a few made-up questions as SciKnowEval's upstream rows."""
    folder.mkdir()
    rows = [
        {
            "question": f"Which element has {number} protons?",
            "choices": {"text": ["helium", "boron", "neon", "iron"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[number % 4],
            "type": "mcq-4-choices",
            "domain": "Chemistry",
            "details": {"level": "L3", "task": "t", "subtask": "s"},
        }
        for number in range(24)
    ]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path

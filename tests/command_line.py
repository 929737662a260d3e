"""Runs of the real command line in a process of their own, and the small tiny world that they train on."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = [
    "--data.world.families=6", "--data.world.train_per_family=2", "--data.world.test_per_family=2",
    "--rollouts.tasks_per_step=6", "--verification.final_samples=8", "--verification.samples=2",
]  # fmt: skip
LORA = ["--model.finetune=lora", "--model.lora_rank=4", "--optimizer.lr=1e-2", "--teacher.kind=ema"]


def run_pmd(
    *arguments: str, code: int = 0, cwd: Path = ROOT, timeout_s: float = 550, first_on_path: Path | None = None
) -> subprocess.CompletedProcess:
    """Run `python -m pmd ARGUMENTS` on one thread; the exit code must be `code`."""
    path = [str(folder) for folder in (first_on_path, os.environ.get("PYTHONPATH")) if folder]
    done = subprocess.run(
        [sys.executable, "-m", "pmd", *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout_s,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip
    assert done.returncode == code, f"exit code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


def small_fit(run_dir: Path, epochs: int, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    """Train on the small tiny world."""
    config = str(ROOT / "configs" / "tiny.yaml")
    epochs_and_folder = [f"--trainer.max_epochs={epochs}", f"--run_dir={run_dir}"]
    return run_pmd("fit", "--config", config, *SMALL, *epochs_and_folder, *arguments, code=code)

"""Runs the real command line in a process of its own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import LORA, small_fit

ROOT = Path(__file__).parents[2]
#: Exits with 99 if a command that needs no weights imported torch.
WITHOUT_TORCH = "import sys; from pmd.cli import main; c = main(); sys.exit(99 if 'torch' in sys.modules else c)"


@pytest.fixture
def refused() -> Callable[..., str]:
    """Run a command that must be refused before torch is imported; return what it says."""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 2, f"exit code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        return done.stderr

    return run


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    small_fit(run_dir, 2, *LORA)
    return run_dir


@pytest.fixture(scope="session")
def full_run(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("full") / "run"
    small_fit(run_dir, 1)
    return run_dir

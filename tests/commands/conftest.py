"""Finished runs that several tests look at."""

from pathlib import Path

import pytest
from command_line import LORA, small_fit


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

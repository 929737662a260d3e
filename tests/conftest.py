"""Settings and fixtures of the whole suite."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# No deadline, because a busy machine is not a bug. The same examples every time, so that everyone sees a failure.
settings.register_profile("pmd", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pmd")

# Read when Triton is imported, which other packages do too: without a GPU, its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

#: Files that take 10 s or more, the longest first: workers that take files in turns (`-n 2`) then end together.
LONG = [
    "test_programs.py", "test_runs.py", "test_loop.py", "test_prediction.py", "test_damage.py",
    "test_server_failures.py", "test_import.py", "test_sweep.py", "test_shipped.py", "test_training_steps.py",
    "test_zoo.py", "test_training_step.py", "test_store.py", "test_verifiers.py", "test_pool.py",
    "test_trainer_ends.py",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the long files first."""
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Fork the server of commands, if any test may need it, while this process has no threads of torch's."""
    if "command_line" in sys.modules:
        sys.modules["command_line"].warm_server()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of the real data sets; tests that need it are skipped without it."""
    folder = Path(os.environ.get("PMD_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "sciknoweval_biology_test.jsonl.gz").is_file():
        pytest.skip("real data not found; set PMD_TEST_DATA")
    return folder

"""Tests that need a CUDA device: `python -m pytest -m gpu tests/gpu`, a few minutes on one GPU, without a network.

They need the extras `gpu` and `dev`: pytest's options name plugins, and beartype.
"""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where they cannot run."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device; on a GPU: python -m pytest -m gpu tests/gpu"))


@pytest.fixture(autouse=True)
def exact_float32():
    """Multiply float32 matrices in float32, not in TF32, so that GPU and CPU can be compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)

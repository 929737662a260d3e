import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The real data, where it is at hand."""
    folder = Path(os.environ.get("PMD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (folder / "sciknoweval_biology_test.jsonl.gz").is_file():
        pytest.skip("real data not found; set PMD_TEST_DATA")
    return folder

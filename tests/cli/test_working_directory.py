"""A file in the working directory is not imported in place of a package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("is_on_path", "code"), [(False, 0), (True, 1)])
def test_the_working_directory_is_searched_only_if_pythonpath_names_it(tmp_path, is_on_path, code):
    (tmp_path / "omegaconf.py").write_text("raise SystemExit('imported from here')")
    path = [str(tmp_path), str(ROOT)] if is_on_path else [str(ROOT)]
    done = subprocess.run(
        [sys.executable, "-m", "pmd", "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert ("imported from here" in done.stderr) == is_on_path

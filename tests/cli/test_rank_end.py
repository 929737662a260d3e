"""A failed rank ends without Python's own end, which takes seconds and is deaf to signals."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, runpy, sys
atexit.register(print, "ended slowly")
runpy.run_module("pmd", run_name="__main__")
"""


@pytest.mark.parametrize(("command", "code"), [("nonsense", 2), ("--version", 0)])
def test_only_a_rank_that_has_failed_ends_at_once(command, code):
    environment = os.environ | {"WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, command], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("ended slowly" in done.stdout) == (code == 0)

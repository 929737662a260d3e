"""A rank that is killed ends the others in time and in words, and the run goes on: two rounds of the benchmark."""

import subprocess
import sys

import pytest
from command_line import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_rank.py"), "--kills", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "0 failure(s)" in done.stdout

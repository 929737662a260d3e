"""A failed rank ends without Python's own end, which takes seconds and is deaf to signals."""

import os
import socket
import subprocess
import sys

import pytest
from command_line import ROOT

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


def test_ranks_that_cannot_meet_say_where(tmp_path):
    """Two jobs of a cluster may choose the same port."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        given = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        command = [sys.executable, "-m", "pmd", "fit", "--config", "configs/tiny.yaml", f"--run_dir={tmp_path}/run"]
        environment = os.environ | {name: str(value) for name, value in given.items()}
        command += ["--trainer.strategy=ddp", "--trainer.devices=2"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert (
        f"RunFailed: rank 0 of 2 could not meet the others at MASTER_ADDR=localhost, MASTER_PORT={port} ("
        in done.stderr
    )
    assert "Traceback" not in done.stderr

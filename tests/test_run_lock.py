"""The lock on a run directory: refused while it is held, gone with the process that held it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pmd.errors import ConfigError
from pmd.run_lock import LOCK_FILE, locked

HOLD = """
import os, sys, time
from pathlib import Path
from pmd.run_lock import locked
with locked(Path(sys.argv[1])):
    is_child = {fork} and os.fork() == 0
    if is_child == {fork}:  # a child has closed its copy by now
        print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path, *, fork: bool = False) -> subprocess.Popen:
    """Start a process that takes the lock, and return once it has it."""
    command = [sys.executable, "-c", HOLD.format(fork=fork), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_by_the_first_ones_name_until_it_is_killed(tmp_path):
    first = holder(tmp_path)
    with pytest.raises(ConfigError, match=rf"in use by process {first.pid} on {os.uname().nodename}"), locked(tmp_path):
        pass
    end(first)  # kill -9
    with locked(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")


def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    first = holder(tmp_path, fork=True)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    assert len(children) == 1
    first.kill()
    first.wait()
    with locked(tmp_path):
        os.kill(int(children[0]), 0)  # it is still there
    os.kill(int(children[0]), signal.SIGKILL)


def test_a_program_that_is_started_does_not_inherit_it(tmp_path):
    with locked(tmp_path):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    with locked(tmp_path):
        assert child.poll() is None
    end(child)


def test_a_folder_that_was_made_and_stayed_empty_is_removed(tmp_path):
    with locked(tmp_path / "runs" / "tiny"):
        pass
    assert not (tmp_path / "runs" / "tiny").exists()
    with locked(tmp_path / "used"):
        (tmp_path / "used" / "config.yaml").write_text("")
    assert {path.name for path in (tmp_path / "used").iterdir()} == {"config.yaml", LOCK_FILE}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir=.*file/run cannot be written"), locked(tmp_path / "file" / "run"):
        pass

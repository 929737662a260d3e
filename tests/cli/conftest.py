"""Runs the real command line in processes of its own: many refused commands in one, each training run in another."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from command_line import LORA, small_fit

ROOT = Path(__file__).parents[2]
#: Runs each list of arguments on standard input; writes exit code, output and errors of each as one line of JSON.
CHILD = """
import contextlib, io, json, sys
from pmd.cli import main
for line in sys.stdin.read().splitlines():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(json.loads(line))
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
assert "torch" not in sys.modules, "a command that needs no weights imported torch"
"""


def run_commands(commands: Sequence[Sequence[str]]) -> list[tuple[int, str, str]]:
    """Run the commands in one process that must not import torch; return exit code, stdout and stderr of each."""
    typed = "\n".join(json.dumps(list(command)) for command in commands)
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=ROOT, input=typed, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def run_all() -> Callable[[Sequence[Sequence[str]]], list[tuple[int, str, str]]]:
    return run_commands


@pytest.fixture
def refused() -> Callable[..., str]:
    """Run a command that must be refused; return what it says."""

    def run(*arguments: str) -> str:
        code, out, err = run_commands([arguments])[0]
        assert code == 2, f"exit code {code}: {out[-2000:]}{err[-2000:]}"
        assert out == ""
        return err

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

"""Runs of the command line in a process of their own, and the small tiny world that they train on."""

import json
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from warm_pmd import fork_server

ROOT = Path(__file__).parents[1]
SMALL = [
    "--data.world.families=6", "--data.world.train_per_family=2", "--data.world.test_per_family=2",
    "--rollouts.tasks_per_step=6", "--verification.final_samples=8", "--verification.samples=2",
]  # fmt: skip
LORA = ["--model.finetune=lora", "--model.lora_rank=4", "--optimizer.lr=1e-2", "--teacher.kind=ema"]


class PmdProcess:
    """A command of pmd that runs in a process of its own, a child of the warm server's (warm_pmd.py)."""

    def __init__(self, arguments: Sequence[str], request: Mapping[str, object]):
        self.arguments = arguments
        self._folder = tempfile.TemporaryDirectory()
        self.out, self.err = Path(self._folder.name, "out"), Path(self._folder.name, "err")
        own = {"arguments": arguments, "out": str(self.out), "err": str(self.err)}
        self.pid = _ask_warm_server({**request, **own})
        self._pidfd = os.pidfd_open(self.pid)

    def has_ended(self, within_s: float = 0.0) -> bool:
        """Wait for the process to end; return whether it did."""
        return bool(select.select([self._pidfd], [], [], within_s)[0])

    def send_signal(self, number: int) -> None:
        """Send the process a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> subprocess.CompletedProcess:
        """Return what the command said, and its exit code; kill it if it takes longer."""
        ended = self.has_ended(timeout_s)
        if not ended:
            self.send_signal(signal.SIGKILL)
        code = _ask_warm_server(self.pid)
        os.close(self._pidfd)
        done = subprocess.CompletedProcess(self.arguments, code, self.out.read_text(), self.err.read_text())
        self._folder.cleanup()
        assert ended, f"pmd {' '.join(self.arguments)} took more than {timeout_s} s: {done.stderr[-4000:]}"
        return done


def start_pmd(
    *arguments: str, cwd: Path = ROOT, first_on_path: Path | None = None, file_bytes: int = 0,
    environment: Mapping[str, str] | None = None, module: str = "pmd.cli",
) -> PmdProcess:  # fmt: skip
    """Start `python -m pmd ARGUMENTS`, or another module's `main`, on one thread.

    With `file_bytes`, no file may grow beyond that size.
    """
    path = [str(first_on_path)] if first_on_path else []
    options = {"cwd": str(cwd), "path": path, "file_bytes": file_bytes, "module": module}
    return PmdProcess(arguments, options | {"environment": dict(environment or {})})


def run_pmd(*arguments: str, code: int = 0, timeout_s: float = 550, **options: Any) -> subprocess.CompletedProcess:
    """Run what `start_pmd` starts; the exit code must be `code`."""
    done = start_pmd(*arguments, **options).wait(timeout_s)
    assert done.returncode == code, f"exit code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


def _ask_warm_server(request: object) -> int:
    requests, answers = warm_server()
    requests.write(json.dumps(request) + "\n")
    requests.flush()
    return int(json.loads(answers.readline()))


@cache
def warm_server() -> tuple[TextIO, TextIO]:
    """Fork, once a session, the process whose children run the commands."""
    return fork_server()


def small_fit(run_dir: Path, epochs: int, *arguments: str, **options: Any) -> subprocess.CompletedProcess:
    """Train on the small tiny world; the options are those of `run_pmd`."""
    config = str(ROOT / "configs" / "tiny.yaml")
    epochs_and_folder = [f"--trainer.max_epochs={epochs}", f"--run_dir={run_dir}"]
    return run_pmd("fit", "--config", config, *SMALL, *epochs_and_folder, *arguments, **options)

"""One attempt at a run of a sweep: the command that starts or resumes it, in a process of its own.

Its output is appended to `RUN_DIR.log`, behind that of earlier attempts.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pmd.errors import ConfigError
from pmd.planning.sweep.grid import PlannedRun
from pmd.run_dir import RunDir, write_json
from pmd.run_lock import describe_holder, locked

#: Where a run has died, its other processes, or a file system that has lost a machine, may hold its lock for so long.
PATIENCE_S = 120.0
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Attempt:
    """What any place needs to run one attempt. Calling it runs the attempt and returns its exit status."""

    run: PlannedRun
    number: int  # 0 for the first one of this sweep
    folder: str  # the working directory, to which the paths of the configuration are relative
    threads: int

    def __call__(self) -> int:
        """Run the command in a child process, which ends when this one does.

        Returns:
            The exit code, or minus the number of the signal that ended it.
        """
        os.chdir(self.folder)
        with log_file(self.run).open("a", encoding="utf-8") as log:
            try:
                arguments = self.prepare()
            except ConfigError as error:
                log.write(f"ConfigError: {error}\n")
                return 2
            log.write(f"python -m pmd {' '.join(arguments)}\n")
            log.flush()
            return subprocess.run(
                [sys.executable, "-m", "pmd", *arguments],
                stdout=log,
                stderr=log,
                env=os.environ | thread_variables(self.threads),
                preexec_fn=_end_with_parent,
            ).returncode

    def prepare(self) -> list[str]:
        """Return the arguments of `python -m pmd`, which resume if there is a checkpoint.

        Raises:
            ConfigError: another process works in the run directory.
        """
        directory = self.run.run_dir
        deadline = time.monotonic() + (PATIENCE_S if self.number else 0.0)
        while describe_holder(directory) and time.monotonic() < deadline:
            time.sleep(0.5)
        resume = RunDir(directory).last.is_file()
        if not resume and directory.exists():
            with locked(directory):  # so it is not another sweep's, which has only just begun
                shutil.rmtree(directory)  # it never reached a checkpoint
        write_json(marker(self.run), self.run.config)
        arguments = [self.run.command, *self.run.arguments, f"--run_dir={directory}"]
        return arguments + (["--ckpt_path=last"] if resume else [])


def log_file(run: PlannedRun) -> Path:
    """Return the file that holds the run's output."""
    return run.run_dir.with_name(run.run_dir.name + ".log")


def marker(run: PlannedRun) -> Path:
    """Return the file that holds the configuration that the run was made from."""
    return run.run_dir.with_name(run.run_dir.name + ".grid.json")


def thread_variables(threads: int) -> dict[str, str]:
    """Return the environment variables that limit a process to so many threads."""
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def _end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies; the directory is then free for another attempt."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

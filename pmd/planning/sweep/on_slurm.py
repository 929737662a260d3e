"""Runs attempts as SLURM jobs, through submitit (extra `slurm`).

A job that reaches its time limit, or is pre-empted, is requeued by submitit and resumes from its last checkpoint.
"""

import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pmd.errors import ConfigError
from pmd.planning.sweep.attempt import Attempt, log_file
from pmd.planning.sweep.launch import INTERRUPTED

DAY_MIN = 24 * 60
POLL_S = 2.0


@dataclass(frozen=True, slots=True)
class Requeueable:
    """An attempt that submitit may end and requeue."""

    attempt: Attempt

    def __call__(self) -> int:
        """Run the attempt; return its exit status."""
        return self.attempt()

    def checkpoint(self) -> Any:
        """Return what the requeued job does: go on from the last checkpoint. submitit calls this by name."""
        from submitit.helpers import DelayedSubmission  # pyright: ignore[reportMissingImports]

        return DelayedSubmission(Requeueable(replace(self.attempt, number=self.attempt.number + 1)))


class Slurm:
    """The SLURM cluster whose `sbatch` is on the path."""

    def __init__(self, slots: int, folder: Path, options: Mapping[str, str], cluster: str = "slurm"):
        """Find SLURM.

        Args:
            slots: how many jobs are queued or run at a time.
            folder: for submitit's own files, seen by all machines.
            options: of sbatch, by their long names; `time` in minutes.
            cluster: another of submitit's executors, such as `local`.

        Raises:
            ConfigError: submitit is not installed, there is no sbatch, or `time` is not a number.
        """
        try:
            import submitit  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError("--on=slurm needs the package submitit; pip install 'pmd[slurm]'.") from None
        rest = dict(options)
        limit = rest.pop("time", str(DAY_MIN))
        if not limit.isdigit():
            raise ConfigError(f"--slurm time={limit} must be a whole number of minutes, such as time={DAY_MIN}.")
        try:
            self.executor = submitit.AutoExecutor(folder, cluster=cluster)
        except RuntimeError as error:
            raise ConfigError(f"--on=slurm cannot be used here ({error}); run it where sbatch works.") from None
        self.executor.update_parameters(timeout_min=int(limit), slurm_additional_parameters=rest)
        self.slots = slots
        self._running: list[tuple[Attempt, Any]] = []

    def start(self, attempt: Attempt) -> None:
        """Submit a job of one task, which starts the run's processes itself."""
        run = attempt.run
        self.executor.update_parameters(
            name=run.run_dir.name,
            tasks_per_node=1,
            cpus_per_task=attempt.threads * run.num_processes,
            gpus_per_node=run.num_gpus,
        )
        self._running.append((attempt, self.executor.submit(Requeueable(attempt))))

    def ended(self) -> list[tuple[Attempt, int]]:
        """Wait until a job has ended; return the attempts of all that have, each with its exit status."""
        while True:
            done = [pair for pair in self._running if pair[1].done()]
            if done:
                self._running = [pair for pair in self._running if pair not in done]
                return [(attempt, self._code_of(job, attempt)) for attempt, job in done]
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Cancel what is queued or runs."""
        for _, job in self._running:
            job.cancel(check=False)

    def _code_of(self, job: Any, attempt: Attempt) -> int:
        """Return the exit status; a job that left no result has been killed, unless somebody has cancelled it."""
        from submitit.core.utils import FailedJobError, UncompletedJobError  # pyright: ignore[reportMissingImports]

        try:
            return job.result()
        except UncompletedJobError as error:
            with log_file(attempt.run).open("a", encoding="utf-8") as log:
                log.write(f"SLURM job {job.job_id}: {error}\n")
            if job.state.startswith("CANCELLED"):
                return INTERRUPTED
            return 1 if isinstance(error, FailedJobError) else -signal.SIGKILL

"""Runs attempts as tasks of a Ray cluster (extra `ray`), which decides where and when.

All machines of the cluster need pmd, and the sweep's folder on a file system that they share.
"""

import signal

from pmd.errors import ConfigError
from pmd.planning.sweep.attempt import Attempt, log_file


class RayCluster:
    """The Ray cluster that this process belongs to, or that RAY_ADDRESS names."""

    def __init__(self, slots: int, runs_per_gpu: int):
        """Connect.

        Args:
            slots: how many attempts are given to the cluster at a time.
            runs_per_gpu: how many attempts share a GPU.

        Raises:
            ConfigError: Ray is not installed, or no cluster runs.
        """
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError("--on=ray needs the package ray; pip install 'pmd[ray]'.") from None
        try:
            ray.init(address="auto", log_to_driver=False, logging_level="warning")
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"--on=ray found no cluster ({' '.join(str(error).split())[:200]}); start one (ray start --head), set "
                "RAY_ADDRESS, or use ray job submit."
            ) from None
        self.ray, self.slots, self.runs_per_gpu = ray, slots, runs_per_gpu
        self._running: dict[ray.ObjectRef, Attempt] = {}

    def start(self, attempt: Attempt) -> None:
        """Submit an attempt; the cluster keeps it until a machine is free."""
        num_processes, gpus = attempt.run.num_processes, attempt.run.num_gpus / self.runs_per_gpu
        # launch() counts the retries of all places, so Ray makes none of its own.
        options = {"num_cpus": attempt.threads * num_processes, "num_gpus": gpus, "max_retries": 0}
        task = self.ray.remote(_run).options(name=str(attempt.run.run_dir), **options)
        self._running[task.remote(attempt)] = attempt

    def ended(self) -> list[tuple[Attempt, int]]:
        """Wait until an attempt has ended; return all that have, each with its exit status."""
        ready, _ = self.ray.wait(list(self._running))
        return [(attempt, self._code_of(task, attempt)) for task in ready if (attempt := self._running.pop(task))]

    def stop(self) -> None:
        """Cancel what still runs; its processes end with their Ray worker."""
        for task in self._running:
            self.ray.cancel(task, force=True)
        self.ray.shutdown()

    def _code_of(self, task: object, attempt: Attempt) -> int:
        """Return the exit status. What Ray says about a worker that is gone, or that cannot start, goes to the log."""
        errors = self.ray.exceptions
        try:
            return self.ray.get(task)
        except errors.RayError as error:
            with log_file(attempt.run).open("a", encoding="utf-8") as log:
                log.write(f"Ray: {type(error).__name__}: {error}\n")
            died = isinstance(error, errors.NodeDiedError | errors.OutOfMemoryError | errors.WorkerCrashedError)
            return -signal.SIGKILL if died else 1


def _run(attempt: Attempt) -> int:
    return attempt()

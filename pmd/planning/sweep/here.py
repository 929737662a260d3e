"""Runs attempts on this machine, each in a process forked from a server that has already imported the trainer."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from pmd.errors import ConfigError
from pmd.planning.sweep.attempt import Attempt, log_file, thread_variables


def gpu_slots(gpus: Sequence[str], per_run: int, runs_per_gpu: int) -> list[str]:
    """Divide GPUs among runs; return a value of CUDA_VISIBLE_DEVICES for each run that has a place at a time."""
    groups = [",".join(gpus[start : start + per_run]) for start in range(0, len(gpus) - per_run + 1, per_run)]
    return groups * runs_per_gpu


class Here:
    """This machine."""

    def __init__(self, main: Callable[[list[str]], int], preload: str, slots: Sequence[str | None], threads: int):
        """Take `main`, the command line, and `preload`, a module that is imported once and then shared by forking.

        Args:
            slots: what each attempt that runs at a time sees as CUDA_VISIBLE_DEVICES; None: what this process sees.
            threads: of each run.
        """
        self.main, self.slots = main, len(slots)
        self._free = list(reversed(slots))
        self._running: dict[int, tuple[Attempt, BaseProcess, str | None]] = {}
        os.environ.update(thread_variables(threads))  # before the server starts, which imports what reads them
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([preload])

    def start(self, attempt: Attempt) -> None:
        """Start an attempt on a free slot."""
        gpus = self._free.pop()
        process = self._context.Process(target=_act, args=(self.main, attempt, gpus))
        process.start()
        self._running[process.sentinel] = attempt, process, gpus

    def ended(self) -> list[tuple[Attempt, int]]:
        """Wait until an attempt has ended; return all that have, each with its exit status."""
        found = []
        for sentinel in wait(list(self._running)):
            assert isinstance(sentinel, int)
            attempt, process, gpus = self._running.pop(sentinel)
            process.join()
            self._free.append(gpus)
            found.append((attempt, process.exitcode or 0))
        return found

    def stop(self) -> None:
        """Interrupt what still runs, and kill it if that takes longer than 30 s."""
        for _, process, _ in self._running.values():
            process.terminate()
        for _, process, _ in self._running.values():
            process.join(30)
            if process.is_alive():
                process.kill()


def _act(main: Callable[[list[str]], int], attempt: Attempt, gpus: str | None) -> None:
    """Act as `python -m pmd`, with the output in the run's log; exit when the sweep exits."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    descriptor = os.open(log_file(attempt.run), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        arguments = attempt.prepare()
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    print("python -m pmd " + " ".join(arguments), flush=True)
    sys.argv = ["pmd", *arguments]
    sys.exit(main(arguments))

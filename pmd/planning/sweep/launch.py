"""Planned runs in; finished run directories out. A process per run, some at a time; what is done is not done again.

Each run is `python -m pmd fit ...` in a process forked from a server that has imported the trainer already. Its output
goes to `RUN_DIR.log`. A run that was cut short resumes from its last checkpoint.
"""

import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from pmd.errors import ConfigError
from pmd.planning.sweep.grid import PlannedRun
from pmd.run_dir import RunDir, write_json


def log_file(run: PlannedRun) -> Path:
    """Return where the run's output is kept."""
    return run.run_dir.with_name(run.run_dir.name + ".log")


def unfinished(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the runs that are still to be made.

    Raises:
        ConfigError: directories hold runs of other configurations than the grid asks for now.
    """
    changed = [run for run in runs if _marker(run).is_file() and json.loads(_marker(run).read_text()) != run.config]
    if changed:
        shown = ", ".join(str(run.run_dir) for run in changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise ConfigError(
            f"{len(changed)} run(s) were made from another configuration than the grid's ({shown}); remove them, or "
            "give another --out."
        )
    return [run for run in runs if not RunDir(run.run_dir).results.is_file()]


def launch(
    runs: Sequence[PlannedRun], jobs: int, threads: int, main: Callable[[list[str]], int], preload: str
) -> Iterator[tuple[PlannedRun, int]]:
    """Run all, `jobs` at a time on `threads` threads each; yield each with its exit code as it ends.

    `main` is the command line, and `preload` a module that the processes share by forking after its import.
    Closing the generator, or an interrupt, stops the runs under way; they resume next time.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    waiting = list(reversed(runs))
    running: dict[int, tuple[PlannedRun, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop()
                process = context.Process(target=_fit, args=(main, _arguments(run), str(log_file(run))))
                process.start()
                running[process.sentinel] = run, process
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                run, process = running.pop(sentinel)
                process.join()
                yield run, process.exitcode or 0
    finally:
        _stop(running)


def _stop(running: Mapping[int, tuple[PlannedRun, BaseProcess]]) -> None:
    for _, process in running.values():
        process.terminate()
    for _, process in running.values():
        process.join(30)
        if process.is_alive():
            process.kill()


def _arguments(run: PlannedRun) -> list[str]:
    """Return the command line of the run, resuming where there is a checkpoint, and mark what it is made from."""
    directory = RunDir(run.run_dir)
    resume = (directory.checkpoints / "last.ckpt").is_file()
    if not resume and run.run_dir.exists():
        shutil.rmtree(run.run_dir)  # it never reached a checkpoint
    run.run_dir.parent.mkdir(parents=True, exist_ok=True)
    write_json(_marker(run), run.config)
    return ["fit", *run.arguments, f"--run_dir={run.run_dir}", *(["--ckpt_path=last"] if resume else [])]


def _marker(run: PlannedRun) -> Path:
    return run.run_dir.with_name(run.run_dir.name + ".grid.json")


def _fit(main: Callable[[list[str]], int], arguments: list[str], log: str) -> None:
    """Be `python -m pmd ARGUMENTS`, with the output in a file; end when the sweep ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    print("python -m pmd " + " ".join(arguments), flush=True)
    sys.argv = ["pmd", *arguments]
    sys.exit(main(arguments))

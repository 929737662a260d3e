"""Runs the planned runs of a sweep, several at a time, each in its own process; finished runs are not repeated.

Each run is `python -m pmd fit ...` in a process forked from a server that has already imported the trainer. Its output
goes to `RUN_DIR.log`. An interrupted run resumes from its last checkpoint.
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
from pmd.run_lock import locked


def log_file(run: PlannedRun) -> Path:
    """Return the file that holds the run's output."""
    return run.run_dir.with_name(run.run_dir.name + ".log")


def unfinished(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the runs that are not finished.

    Raises:
        ConfigError: run directories were made from other configurations than the grid's.
    """
    changed = [run for run in runs if _marker(run).is_file() and json.loads(_marker(run).read_text()) != run.config]
    if changed:
        shown = ", ".join(str(run.run_dir) for run in changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise ConfigError(
            f"{len(changed)} run(s) were made from another configuration than the grid's ({shown}); remove them, or "
            "choose another --out."
        )
    return [run for run in runs if not run.results.is_file()]


def launch(
    runs: Sequence[PlannedRun],
    jobs: int,
    threads: int,
    main: Callable[[list[str]], int],
    preload: str,
    gpus: Sequence[str] = (),
) -> Iterator[tuple[PlannedRun, int]]:
    """Run all runs, `jobs` at a time with `threads` threads each; yield each with its exit code when it ends.

    `main` is the command line, and `preload` a module that is imported once and then shared by forking. Closing the
    generator, or an interrupt, stops the active runs; the next sweep resumes them. A run that a signal has killed is
    tried once more, from its last checkpoint.

    Args:
        gpus: GPUs as in CUDA_VISIBLE_DEVICES. Each run sees one of them; only more jobs than GPUs share one.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    waiting = list(reversed(runs))
    free = [gpus[slot % len(gpus)] if gpus else None for slot in reversed(range(jobs))]
    retried: set[Path] = set()
    running: dict[int, tuple[PlannedRun, BaseProcess, str | None]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run, gpu = waiting.pop(), free.pop()
                process = context.Process(target=_fit, args=(main, _arguments(run), str(log_file(run)), gpu))
                process.start()
                running[process.sentinel] = run, process, gpu
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                run, process, gpu = running.pop(sentinel)
                process.join()
                free.append(gpu)
                code = process.exitcode or 0
                if code < 0 and run.run_dir not in retried:
                    retried.add(run.run_dir)
                    waiting.append(run)
                else:
                    yield run, code
    finally:
        _stop(running)


def _stop(running: Mapping[int, tuple[PlannedRun, BaseProcess, str | None]]) -> None:
    for _, process, _ in running.values():
        process.terminate()
    for _, process, _ in running.values():
        process.join(30)
        if process.is_alive():
            process.kill()


def _arguments(run: PlannedRun) -> list[str]:
    """Return the run's command line, which resumes if there is a checkpoint, and store the configuration next to it."""
    directory = RunDir(run.run_dir)
    resume = (directory.checkpoints / "last.ckpt").is_file()
    if not resume and run.run_dir.exists():
        with locked(run.run_dir):  # so it is not another sweep's, which has only just begun
            shutil.rmtree(run.run_dir)  # it never reached a checkpoint
    run.run_dir.parent.mkdir(parents=True, exist_ok=True)
    write_json(_marker(run), run.config)
    return [run.command, *run.arguments, f"--run_dir={run.run_dir}", *(["--ckpt_path=last"] if resume else [])]


def _marker(run: PlannedRun) -> Path:
    return run.run_dir.with_name(run.run_dir.name + ".grid.json")


def _fit(main: Callable[[list[str]], int], arguments: list[str], log: str, gpu: str | None) -> None:
    """Act as `python -m pmd ARGUMENTS` with the output in a file; exit when the sweep exits."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    print("python -m pmd " + " ".join(arguments), flush=True)
    sys.argv = ["pmd", *arguments]
    sys.exit(main(arguments))

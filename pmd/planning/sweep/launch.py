"""Runs the planned runs of a sweep somewhere, several at a time; finished runs are not repeated.

Where they run is a `Place`: this machine (`here.py`), a Ray cluster (`on_ray.py`) or SLURM (`on_slurm.py`).
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pmd.config.resume import Change, find_changes
from pmd.errors import ConfigError
from pmd.planning.sweep.attempt import Attempt, marker
from pmd.planning.sweep.grid import PlannedRun

INTERRUPTED = 130


class Place(Protocol):
    """Where attempts run."""

    @property
    def slots(self) -> int:
        """How many attempts it takes at a time."""
        ...

    def start(self, attempt: Attempt) -> None:
        """Start an attempt, or put it into the place's own queue."""
        ...

    def ended(self) -> list[tuple[Attempt, int]]:
        """Wait until an attempt has ended; return all that have, each with its exit status."""
        ...

    def stop(self) -> None:
        """Stop what still runs, and wait for no results."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended."""

    run: PlannedRun
    code: int  # of the process, negative for a signal
    retries_left: int | None = None  # if the run is tried again, how often after that; None if this was its end


def unfinished(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the runs that are not finished.

    Raises:
        ConfigError: run directories were made from other configurations than the grid's.
    """
    changes = {run.run_dir: _changes_since_begun(run) for run in runs if marker(run).is_file()}
    changed = {folder: found for folder, found in changes.items() if found}
    if changed:
        lines = [f"{folder}: {', '.join(map(str, found[:3]))}" for folder, found in list(changed.items())[:3]]
        shown = "; ".join(lines) + ("; ..." if len(changed) > 3 else "")
        raise ConfigError(
            f"{len(changed)} run(s) were made from another configuration than the grid's ({shown}); remove them, or "
            "choose another --out."
        )
    return [run for run in runs if not run.results.is_file()]


def _changes_since_begun(run: PlannedRun) -> list[Change]:
    """Return the settings in which the grid's configuration of a run differs from that with which it was begun."""
    begun_with: str = json.loads(marker(run).read_text())
    return find_changes(json.loads(begun_with), json.loads(run.config))


def launch(runs: Sequence[PlannedRun], place: Place, threads: int, retries: int) -> Iterator[Outcome]:
    """Run all runs; yield how each attempt ended, when it ends.

    A run that died is tried again, from its last checkpoint. Closing the generator, or an interrupt, stops the active
    runs; the next sweep resumes them.

    Args:
        threads: of each run.
        retries: how often a run is tried again.
    """
    folder, waiting = str(Path.cwd()), list(reversed(runs))
    num_deaths: Counter[Path] = Counter()
    num_running = 0
    try:
        while waiting or num_running:
            while waiting and num_running < place.slots:
                run = waiting.pop()
                run.run_dir.parent.mkdir(parents=True, exist_ok=True)
                place.start(Attempt(run, num_deaths[run.run_dir], folder, threads))
                num_running += 1
            for attempt, code in place.ended():
                num_running -= 1
                run = attempt.run
                if has_died(code) and num_deaths[run.run_dir] < retries:
                    num_deaths[run.run_dir] += 1
                    waiting.append(run)
                    yield Outcome(run, code, retries - num_deaths[run.run_dir])
                else:
                    yield Outcome(run, code)
    finally:
        place.stop()


def has_died(code: int) -> bool:
    """Whether an exit status says that a signal ended a process of the run (the kernel's when memory runs out, too).

    Shells, and pmd itself for a rank of several, say so with 128 and the signal's number. An interrupt is no death.
    """
    return code < 0 or (code > 128 and code != INTERRUPTED)

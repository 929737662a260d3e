"""`python -m pmd sweep GRID.yaml`: runs every configuration of a grid and tabulates the results over seeds."""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pmd.cli import main as run_command
from pmd.cli.arguments import make_parser
from pmd.config.trainer import num_cuda_devices
from pmd.errors import ConfigError
from pmd.planning.sweep.grid import PlannedRun, plan, read_grid, row_label
from pmd.planning.sweep.launch import launch, log_file, unfinished

DESCRIPTION = """Run a grid (a base configuration x overlays x seeds), one process per run, and tabulate it over seeds.

  python -m pmd sweep ablations/grids/main_table.yaml
  python -m pmd sweep ablations/grids/main_table.yaml --dry-run
  python -m pmd sweep ablations/grids/paper/main_table.yaml --hours

Finished runs are not repeated, interrupted ones are resumed, and failed ones are reported, keep their log, and are
tried again by the next call. The table (mean and standard error over seeds) is printed and goes to the output folder
as table.md, sweep.json, sweep.png and, with curves and pass@k, report.html. If the grid names a reference, the
differences of the other arms from it, paired by seed, go to differences.md."""


def main(argv: Sequence[str]) -> int:
    """Run the command; return 0, or 1 if a run failed."""
    parser = make_parser("sweep", DESCRIPTION)
    parser.add_argument("grid", type=Path, metavar="GRID", help="a grid file, such as those in ablations/grids/")
    parser.add_argument("--out", type=Path, help="folder of the runs and the table (default: runs/GRID)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one per GPU, or per core)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    parser.add_argument(
        "--hours", action="store_true", help="predict the GPU hours of grids on real data, for any machine, and stop"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs as commands and stop")
    options = parser.parse_args(argv)
    gpus = visible_gpus(os.environ)
    jobs = options.jobs if options.jobs is not None else len(gpus) or len(os.sched_getaffinity(0))
    numbers = {"jobs": jobs, "threads": options.threads}
    wrong = [f"--{name}={value} must be at least 1." for name, value in numbers.items() if value < 1]
    if wrong:
        raise ConfigError(wrong)
    out = options.out or Path("runs") / options.grid.stem
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log file has room
    if options.hours:
        _print_hours(plan(options.grid, out, for_here=False), console)
        return 0
    runs = plan(options.grid, out)
    left = unfinished(runs)
    if options.dry_run:
        for run in left:
            print(f"python -m pmd {run.command} {' '.join(run.arguments)} --run_dir={run.run_dir}")
        return 0
    console.print(f"{len(runs)} runs, {len(runs) - len(left)} of them done; {jobs} at a time, in {out}", markup=False)
    failed = _run_all(left, jobs, options.threads, gpus, console)
    from pmd.planning.sweep.page import write_page
    from pmd.planning.sweep.table import make_rows, print_rows, write_rows

    rows = make_rows(runs)
    write_rows(rows, out, options.grid.stem)
    write_page(runs, rows, out, options.grid.stem)
    print_rows(rows, options.grid.stem, console)
    _compare(runs, read_grid(options.grid)[0].reference, out, console)
    for run in failed:
        console.print(f"failed: {_name(run)}; see {log_file(run)}", markup=False)
    console.print(f"report.html, table.md, sweep.json and sweep.png are in {out}", markup=False)
    return 1 if failed else 0


def _print_hours(runs: Sequence[PlannedRun], console: Console) -> None:
    """Print the predicted GPU hours of each block and of the whole grid.

    Raises:
        ConfigError: a run is not on data of known size.
    """
    from pmd.planning.hours import predict_run

    totals: dict[str, list[float]] = {}
    for run in runs:
        try:
            hours = predict_run(json.loads(run.config), trains=run.command == "fit")
        except ValueError as error:
            raise ConfigError(f"--hours: {error}; `pmd bench` measures any configuration.") from error
        totals.setdefault(run.block, []).append(hours)
    table = Table("block", "runs", "hours", title="predicted hours of one H200 (pmd/planning/hours.py says from what)")
    for block, hours in [*totals.items(), ("all", [h for own in totals.values() for h in own])]:
        table.add_row(escape(block or "-"), str(len(hours)), f"{sum(hours):,.0f}")
    console.print(table)


def _compare(runs: Sequence[PlannedRun], reference: str, out: Path, console: Console) -> None:
    """Print and write the differences from the grid's reference, if it names one."""
    from pmd.planning.sweep.paired import difference_rows, print_differences, write_differences

    rows = difference_rows(runs, reference) if reference else []
    if rows:
        print_differences(rows, reference, console)
        write_differences(rows, reference, out)


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the GPUs that the sweep may use, as in CUDA_VISIBLE_DEVICES."""
    count = num_cuda_devices()
    named = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def _run_all(
    runs: Sequence[PlannedRun], jobs: int, threads: int, gpus: Sequence[str], console: Console
) -> list[PlannedRun]:
    """Run these under a progress bar; return the runs that failed."""
    failed: list[PlannedRun] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that launch() stops its runs
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not runs) as progress:
        bar = progress.add_task("runs", total=len(runs))
        for number, (run, code) in enumerate(launch(runs, jobs, threads, run_command, "pmd.cli.run", gpus), start=1):
            if code != 0:
                failed.append(run)
                progress.console.print(f"{_name(run)} ended with exit code {code}; see {log_file(run)}", markup=False)
            if not console.is_terminal:
                console.print(f"{number}/{len(runs)} {_name(run)}", markup=False)  # a log file shows no bar
            progress.update(bar, advance=1, description=f"last: {escape(_name(run))}")
    return failed


def _name(run: PlannedRun) -> str:
    parts = [run.block, row_label(run.arm, run.choices), f"seed {run.seed}"]
    return ", ".join(part for part in parts if part)

"""`python -m pmd sweep GRID.yaml`: runs every configuration of a grid and tabulates the results over seeds."""

import argparse
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
from pmd.planning.sweep.attempt import log_file
from pmd.planning.sweep.grid import PlannedRun, plan, read_grid, row_label
from pmd.planning.sweep.here import Here, gpu_slots
from pmd.planning.sweep.launch import Outcome, Place, launch, unfinished

DESCRIPTION = """Run a grid (a base configuration x overlays x seeds), one process per run, and tabulate it over seeds.

  python -m pmd sweep ablations/grids/main_table.yaml
  python -m pmd sweep ablations/grids/main_table.yaml --dry-run
  python -m pmd sweep ablations/grids/paper/main_table.yaml --hours
  python -m pmd sweep GRID.yaml --on ray --out /shared/sweep
  python -m pmd sweep GRID.yaml --on slurm --out /shared/sweep --slurm partition=gpu --slurm time=720

Each run has a GPU of its own, or as many as its trainer.devices. Finished runs are not repeated, interrupted ones are
resumed, and failed ones are reported, keep their log, and are tried again by the next call. A run that a signal has
killed, or whose machine is lost, is tried again at once, from its last checkpoint.

On a Ray cluster or on SLURM, all machines need pmd, the files of the grid at the same paths, and --out on a file
system that they share. Runs with trainer.accelerator: cpu need no GPU there.

The table (mean and standard error over seeds) is printed and goes to the output folder as table.md, sweep.json,
sweep.png and, with curves and pass@k, report.html. If the grid names a reference, the differences of the other arms
from it, paired by seed, go to differences.md."""


def main(argv: Sequence[str]) -> int:
    """Run the command; return 0, or 1 if a run failed."""
    options = make_sweep_parser().parse_args(argv)
    problems = _option_problems(options)
    if problems:
        raise ConfigError(problems)
    out = options.out or Path("runs") / options.grid.stem
    if options.on != "local":
        out = out.absolute()  # the working directory of another process may be another
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log file has room
    if options.hours:
        _print_hours(plan(options.grid, out, for_here=False), console)
        return 0
    runs = plan(options.grid, out, for_here=options.on == "local")
    left = unfinished(runs)
    if options.dry_run:
        for run in left:
            print(f"python -m pmd {run.command} {' '.join(run.arguments)} --run_dir={run.run_dir}")
        return 0
    place = _place(options, left, out)
    at_a_time = f"{place.slots} at a time" if options.on == "local" else f"on {options.on}"
    console.print(f"{len(runs)} runs, {len(runs) - len(left)} of them done; {at_a_time}, in {out}", markup=False)
    failed = _run_all(left, place, options, console)
    from pmd.planning.sweep.page import write_page
    from pmd.planning.sweep.paired import difference_rows, print_differences, write_differences
    from pmd.planning.sweep.table import make_rows, print_rows, write_rows

    rows = make_rows(runs)
    write_rows(rows, out, options.grid.stem)
    write_page(runs, rows, out, options.grid.stem)
    print_rows(rows, options.grid.stem, console)
    reference = read_grid(options.grid)[0].reference
    if reference and (differences := difference_rows(rows, reference)):
        print_differences(differences, reference, console)
        write_differences(differences, reference, out)
    for run in failed:
        console.print(f"failed: {_name(run)}; see {log_file(run)}", markup=False)
    console.print(f"report.html, table.md, sweep.json and sweep.png are in {out}", markup=False)
    return 1 if failed else 0


def make_sweep_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = make_parser("sweep", DESCRIPTION)
    parser.add_argument("grid", type=Path, metavar="GRID", help="a grid file, such as those in ablations/grids/")
    parser.add_argument("--out", type=Path, help="folder of the runs and the table (default: runs/GRID)")
    parser.add_argument(
        "--on", choices=("local", "ray", "slurm"), default="local", help="where the runs run (default: local)"
    )
    parser.add_argument(
        "--jobs", type=int, help="runs at a time (default: as many as have a GPU, or a core; on clusters: all)"
    )
    parser.add_argument("--runs-per-gpu", type=int, default=1, help="runs that share a GPU (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    parser.add_argument("--retries", type=int, default=2, help="how often a run that died is tried again (default: 2)")
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="OPTION=VALUE",
        help="an option of sbatch, without its dashes; time in minutes (default: time=1440)",
    )  # fmt: skip
    parser.add_argument(
        "--hours", action="store_true", help="predict the GPU hours of grids on real data, for any machine, and stop"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs as commands and stop")
    return parser


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


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the GPUs that the sweep may use, as in CUDA_VISIBLE_DEVICES."""
    count = num_cuda_devices()
    named = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def _option_problems(options: argparse.Namespace) -> list[str]:
    smallest = {"jobs": 1, "threads": 1, "runs_per_gpu": 1, "retries": 0}
    given = {name: value for name in smallest if (value := getattr(options, name)) is not None}
    problems = [
        f"--{name.replace('_', '-')}={value} must be at least {smallest[name]}."
        for name, value in given.items()
        if value < smallest[name]
    ]
    problems += [
        f"--slurm {option} is no OPTION=VALUE; write, for example, --slurm partition=gpu."
        for option in options.slurm
        if not all(option.partition("="))
    ]
    if options.on == "slurm" and options.runs_per_gpu > 1:
        problems.append(f"--runs-per-gpu={options.runs_per_gpu} is not for --on slurm, which divides no GPU; omit it.")
    if options.slurm and options.on != "slurm":
        problems.append(f"--slurm {options.slurm[0]} is for --on slurm; add it, or leave it out.")
    return problems


def _place(options: argparse.Namespace, runs: Sequence[PlannedRun], out: Path) -> Place:
    """Return where the runs run.

    Raises:
        ConfigError: this machine has too few GPUs, or there is no cluster.
    """
    if options.on == "local":
        slots = _slots(options.jobs, options.runs_per_gpu, runs, visible_gpus(os.environ))
        return Here(run_command, "pmd.cli.run", slots, options.threads)
    jobs = options.jobs if options.jobs is not None else max(1, len(runs))
    if options.on == "ray":
        most = max((run.num_gpus for run in runs), default=0)
        if options.runs_per_gpu > 1 and most > 1:
            raise ConfigError(f"--runs-per-gpu={options.runs_per_gpu}: some run has {most} GPUs; leave it out.")
        from pmd.planning.sweep.on_ray import RayCluster

        return RayCluster(jobs, options.runs_per_gpu)
    from pmd.planning.sweep.on_slurm import Slurm

    return Slurm(jobs, out / "slurm", dict(option.split("=", 1) for option in options.slurm))


def _slots(
    jobs: int | None, runs_per_gpu: int, runs: Sequence[PlannedRun], gpus: Sequence[str]
) -> Sequence[str | None]:
    """Return the GPUs of each run that runs at a time.

    Raises:
        ConfigError: more runs at a time are asked for than there are GPUs for.
    """
    per_run = max((run.num_gpus for run in runs), default=0)
    if not gpus or not per_run:
        return [None] * (jobs or len(os.sched_getaffinity(0)))
    slots = gpu_slots(gpus, per_run, runs_per_gpu)
    if not slots:
        raise ConfigError(f"trainer.devices={per_run} needs as many GPUs, and there are {len(gpus)}; lower it.")
    if jobs is not None and jobs > len(slots):
        raise ConfigError(
            f"--jobs={jobs}: {len(gpus)} GPU(s) hold {len(slots)} run(s) at a time, of {per_run} GPU(s) each; raise "
            f"--runs-per-gpu={runs_per_gpu}, or lower --jobs."
        )
    return slots[:jobs]


def _run_all(
    runs: Sequence[PlannedRun], place: Place, options: argparse.Namespace, console: Console
) -> list[PlannedRun]:
    """Run these under a progress bar; return the runs that failed."""
    failed: list[PlannedRun] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that launch() stops its runs
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not runs) as progress:
        bar, number = progress.add_task("runs", total=len(runs)), 0
        for outcome in launch(runs, place, options.threads, options.retries):
            run = outcome.run
            if outcome.code != 0:
                progress.console.print(_sentence(outcome), markup=False)
            if outcome.retries_left is not None:
                continue
            number += 1
            if outcome.code != 0:
                failed.append(run)
            if not console.is_terminal:
                console.print(f"{number}/{len(runs)} {_name(run)}", markup=False)  # a log file shows no bar
            progress.update(bar, advance=1, description=f"last: {escape(_name(run))}")
    return failed


def _sentence(outcome: Outcome) -> str:
    """Say how an attempt ended that did not succeed, and what becomes of its run."""
    code, run = outcome.code, outcome.run
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    if outcome.retries_left is None:
        return f"{_name(run)} {how}; see {log_file(run)}"
    return f"{_name(run)} {how}; it goes on from its last checkpoint (retries left: {outcome.retries_left})"


def _name(run: PlannedRun) -> str:
    parts = [run.block, row_label(run.arm, run.choices), f"seed {run.seed}"]
    return ", ".join(part for part in parts if part)

"""`python -m pmd runs [FOLDER]`: the runs below a folder, with their method, state and score."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pmd.cli.arguments import make_parser
from pmd.cli.printable import printable
from pmd.errors import ConfigError
from pmd.run_dir import RunDir
from pmd.run_lock import describe_holder

DESCRIPTION = """List runs: method, seed, state, steps, score.

  python -m pmd runs
  python -m pmd runs runs/sweep --sort score

A run is `running` while a process works in it, `finished` once its results are written, `stopped` if it can be resumed
(--ckpt_path last), and `failed` if it ended before its first checkpoint. The score is that of the last checkpoint on
the test tasks, without memory in the prompt, in percent; before a run is finished, it is the last one on the validation
tasks, in brackets."""
SORTS = ("changed", "name", "score", "method")


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What can be said about a run from its files alone."""

    path: Path
    method: str
    seed: str
    state: str
    step: int
    score: float | None  # in [0, 1]
    is_final: bool  # whether the score is of the test tasks
    changed: float  # seconds since the epoch


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    parser = make_parser("runs", DESCRIPTION)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="where to look (default: runs)")
    parser.add_argument("--sort", choices=SORTS, default="changed", help="order of the rows (default: changed)")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each run instead of a table")
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        raise ConfigError(f"folder={options.folder} is not a directory; give one that holds runs.")
    runs = sort_runs(find_runs(options.folder), options.sort)
    if options.json:
        for run in runs:
            print(json.dumps({name: getattr(run, name) for name in RunSummary.__slots__} | {"path": str(run.path)}))
        return 0
    if not runs:
        print(f"There is no run below {options.folder}; start one with: python -m pmd fit --config configs/tiny.yaml")
        return 0
    print_runs(runs, options.folder)
    return 0


def find_runs(folder: Path) -> list[RunSummary]:
    """Return the runs in the folder and below it; what lies inside a run is not searched."""
    if (folder / "config.yaml").is_file():
        return [summarize(RunDir(folder))]
    children = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [run for child in children for run in find_runs(child)]


def summarize(run_dir: RunDir) -> RunSummary:
    """Read one run's files; what is damaged counts as missing."""
    config, results, rows = _mapping(run_dir.config), _mapping(run_dir.results), run_dir.read_metrics()
    phases = results.get("phases") if isinstance(results.get("phases"), dict) else {}
    last = phases.get("last") if isinstance(phases, dict) else None
    validated = [float(row["verify/avg"]) for row in rows if row.get("verify/avg")]
    score = last.get("avg") if isinstance(last, dict) else validated[-1] if validated else None
    if describe_holder(run_dir.root):
        state = "running"
    elif results:
        state = "finished"
    else:
        state = "stopped" if run_dir.last.is_file() else "failed"
    newest = max(path.stat().st_mtime for path in (run_dir.config, run_dir.metrics, run_dir.results) if path.exists())
    step = max((int(float(row["step"])) + 1 for row in rows), default=0)
    method, seed = str(config.get("method", "-")), str(config.get("seed_everything", "-"))
    return RunSummary(run_dir.root, method, seed, state, step, score, isinstance(last, dict), newest)


def sort_runs(runs: Sequence[RunSummary], by: str) -> list[RunSummary]:
    """Return the runs by name or method, or with the newest or best first."""
    keys: dict[str, Callable[[RunSummary], Any]] = {
        "changed": lambda run: -run.changed,
        "name": lambda run: run.path,
        "score": lambda run: (run.score is None, -(run.score or 0.0), run.path),
        "method": lambda run: (run.method, run.path),
    }
    return sorted(runs, key=keys[by])


def print_runs(runs: Sequence[RunSummary], folder: Path) -> None:
    """Print the table."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    for heading in ("method", "seed", "state"):
        table.add_column(heading)
    for heading in ("steps", "score", "changed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        score = "-" if run.score is None else f"{100 * run.score:.1f}" if run.is_final else f"({100 * run.score:.1f})"
        name = str(run.path.relative_to(folder)) if run.path != folder else str(folder)
        words = (printable(name), printable(run.method), printable(run.seed), run.state)
        table.add_row(
            *map(Text, words), str(run.step), score, time.strftime("%m-%d %H:%M", time.localtime(run.changed))
        )
    Console().print(table)


def _mapping(path: Path) -> dict[str, Any]:
    """Return a YAML or JSON file's mapping; an empty one if there is none."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}

"""Does a memory help another model? Compares a co-evolved memory, one built with a fixed policy, and none.

    python -m pmd bootstrap --model tiny_large
    python benchmarks/transfer_tiny.py --out runs/transfer --model bootstrapped/tiny_large

For each seed two runs of the shipped `tiny` model make and export a memory: the whole method, and the same with a fixed
policy. Then the receiving model trains with an empty memory, and with each export at the start
(`memory.import_path`), which is either updated as usual or never written again (`memory.frozen`). Printed:
memory-free avg@16 on held-out tasks after every second epoch (validation) and at the end (test), with mean and standard
error over the seeds, and the same for the differences within a seed. Finished runs are not repeated.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

SOURCES = {"co-evolved": [], "fixed-policy": ["--config", "ablations/frozen_policy.yaml"]}
RECEIVERS: dict[str, tuple[str | None, list[str]]] = {
    "empty": (None, []),
    "co-evolved": ("co-evolved", []),
    "fixed policy": ("fixed-policy", []),
}
CLOSED: dict[str, tuple[str | None, list[str]]] = {
    f"{name}, never written again": (name.replace(" ", "-"), ["--memory.frozen=true"])
    for name in ("co-evolved", "fixed policy")
}
SHOWN_EPOCHS = (2, 4, 6, 8, 10, 12)


def pmd(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pmd", *arguments], check=True, stdout=subprocess.DEVNULL)


def fit(run_dir: Path, seed: int, *arguments: str) -> None:
    """Train unless the run is finished."""
    if not (run_dir / "results.json").exists():
        pmd(
            "fit", "--config", "configs/tiny.yaml", *arguments, f"--seed_everything={seed}", f"--run_dir={run_dir}",
            "--verification.memory_conditioned=false",
        )  # fmt: skip


def source(out: Path, name: str, seed: int) -> Path:
    """Return the export of one source run."""
    run_dir = out / f"source-{name}-{seed}"
    fit(run_dir, seed, *SOURCES[name], "--verification.every_epochs=12")
    export = run_dir / "memory.jsonl"
    if not export.exists():
        pmd("memory", "export", str(run_dir), str(export))
    return export


def scores(run_dir: Path) -> dict[str, float]:
    """Return the memory-free scores by column, in percent."""
    with (run_dir / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("verify/avg") and row.get("memory/generation")]
    found = {f"epoch {int(row['epoch']) + 1}": 100 * float(row["verify/avg"]) for row in rows}
    last = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))["phases"]["last"]
    return found | {"test": 100 * last["avg"]}


def mean_and_error(values: list[float]) -> str:
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{np.mean(values):.1f} ± {error:.1f}"


def main() -> None:
    """Train the sources, then the receivers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--model", default="tiny", help="the receiving model; default: the source's own")
    parser.add_argument("--closed", action="store_true", help="also with each memory never written again")
    parser.add_argument("--epochs", type=int, default=8, help="of the receiving runs")
    arguments = parser.parse_args()
    receivers = RECEIVERS | (CLOSED if arguments.closed else {})
    receiving = [f"--model.path={arguments.model}", f"--trainer.max_epochs={arguments.epochs}"]
    receiving += ["--verification.samples=16", "--verification.every_epochs=2"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in receivers}
    for seed in track(arguments.seeds, description="seeds"):
        for name, (source_name, extra) in receivers.items():
            slug = name.replace(",", "").replace(" ", "-")
            run_dir = arguments.out / f"to-{Path(arguments.model).name}-{slug}-{seed}"
            if source_name is not None:
                extra = [*extra, f"--memory.import_path={source(arguments.out, source_name, seed)}"]
            fit(run_dir, seed, *receiving, *extra)
            found[name].append(scores(run_dir))
    columns = [column for n in SHOWN_EPOCHS if (column := f"epoch {n}") in found["empty"][0]] + ["test"]
    table = Table(title=f"memory-free avg@16 of {arguments.model}, {len(arguments.seeds)} seeds", header_style="bold")
    for column in ("memory at the start", *columns):
        table.add_column(column, justify="left" if column[0] == "m" else "right")
    for name, runs in found.items():
        table.add_row(name, *(mean_and_error([run[column] for run in runs]) for column in columns))
    for name, runs in list(found.items())[1:]:  # runs of one seed share their world: the differences vary less
        pairs = list(zip(runs, found["empty"], strict=True))
        table.add_row(f"{name} minus empty", *(mean_and_error([a[c] - b[c] for a, b in pairs]) for c in columns))
    Console().print(table)


if __name__ == "__main__":
    main()

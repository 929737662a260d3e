"""Metrics of a run."""

import csv
from pathlib import Path


def metrics(run_dir: Path, name: str) -> list[float]:
    rows = csv.DictReader((run_dir / "metrics.csv").open())
    return [float(row[name]) for row in rows if row.get(name)]

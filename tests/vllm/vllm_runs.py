"""Metrics of a run, and made-up data."""

import csv
import json
from pathlib import Path


def metrics(run_dir: Path, name: str) -> list[float]:
    rows = csv.DictReader((run_dir / "metrics.csv").open())
    return [float(row[name]) for row in rows if row.get(name)]


def write_chemistry(folder: Path) -> Path:
    """Write a few made-up questions as SciKnowEval's upstream rows."""
    folder.mkdir()
    rows = [
        {
            "question": f"Which element has {number} protons?",
            "choices": {"text": ["helium", "boron", "neon", "iron"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[number % 4],
            "type": "mcq-4-choices",
            "domain": "Chemistry",
            "details": {"level": "L3", "task": "t", "subtask": "s"},
        }
        for number in range(24)
    ]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path

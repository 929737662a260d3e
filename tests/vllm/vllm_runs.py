"""Runs of the command line in a process of their own (vLLM lives once in a process), their metrics, made-up data."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pmd(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pmd", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=550,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


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

"""Does a memory help another run to begin with? Co-evolved memory against one built with a fixed policy, and none.

    python benchmarks/transfer_tiny.py --out runs/transfer --seeds 0 1 2
    python benchmarks/transfer_tiny.py --out runs/transfer --model path/to/another/tiny/model

For each seed two source runs make and export a memory: the whole method, and the same with a fixed policy. Then the
receiving model trains for a few epochs three times: with an empty memory and with each export at the start
(`memory.import_path`). Printed: held-out memory-free avg@16, mean and standard error over the seeds. Runs that are
there already are not repeated.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

SOURCES = {"co-evolved": [], "fixed policy": ["--config", "ablations/frozen_policy.yaml"]}


def pmd(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pmd", *arguments], check=True, stdout=subprocess.DEVNULL)


def fit(run_dir: Path, seed: int, *arguments: str) -> float:
    """Train unless it was done; return the last checkpoint's held-out avg@16."""
    if not (run_dir / "results.json").exists():
        pmd(
            "fit", "--config", "configs/tiny.yaml", *arguments, f"--seed_everything={seed}", f"--run_dir={run_dir}",
        )  # fmt: skip
    return json.loads((run_dir / "results.json").read_text(encoding="utf-8"))["phases"]["last"]["avg"] * 100


def main() -> None:
    """Make the sources, then the receivers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="tiny", help="the receiving model; default: the source's own")
    parser.add_argument("--epochs", type=int, default=3, help="of the receiving runs")
    arguments = parser.parse_args()
    scores: dict[str, list[float]] = {"empty": [], **{name: [] for name in SOURCES}}
    for seed in arguments.seeds:
        receiver = [f"--model.path={arguments.model}", f"--trainer.max_epochs={arguments.epochs}"]
        scores["empty"].append(fit(arguments.out / f"empty-{seed}", seed, *receiver))
        for name, overlay in SOURCES.items():
            source = arguments.out / f"{name.replace(' ', '-')}-{seed}"
            fit(source, seed, *overlay)
            export = source / "memory.jsonl"
            pmd("memory", "export", str(source), str(export))
            run_dir = source.with_name(f"from-{source.name}")
            scores[name].append(fit(run_dir, seed, *receiver, f"--memory.import_path={export}"))
            print(f"seed {seed}, {name}: {scores[name][-1]:.1f}", flush=True)
    for name, values in scores.items():
        error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        print(f"{name}: {np.mean(values):.1f} +- {error:.1f} over {len(values)} seeds")


if __name__ == "__main__":
    main()

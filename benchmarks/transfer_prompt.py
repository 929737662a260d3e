"""Does a memory help models of other sizes that only read it? The paper's transfer protocol in the hard tiny world.

    python -m pmd bootstrap --model tiny_hard_large
    python -m pmd sweep ablations/grids/tiny_table3.yaml
    python benchmarks/transfer_prompt.py --runs runs/tiny_table3/hard_world --out runs/transfer_prompt \
        --model tiny_hard --model bootstrapped/tiny_hard_large

The untrained models are tested with the top k items of a memory in their prompt: a co-evolved one (the sweep's arm
`PMD`), and one that grew while the policy was frozen (`PMD, frozen policy`). k = 0 shows no memory. Printed and drawn:
avg@16 on the test tasks by model, memory and k, mean and standard error over the seeds. Finished tests are not
repeated.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

SOURCES = {"co-evolved": "PMD", "frozen policy": "PMD_frozen_policy"}
DEPTHS = (1, 3, 5, 12)


def tested(run_dir: Path, model: str, seed: int, store: Path | None, k: int) -> float:
    """Return the avg, in percent, of an untrained model with k items of a memory in its prompt."""
    shown = [f"--memory={store}", f"--memory.k={k}"] if store is not None else []
    result = run_dir / ("test-initial" if store is None else f"test-initial-memory-k{k}") / "results.json"
    if not result.exists():
        command = [
            *(sys.executable, "-m", "pmd", "test", "--config", "configs/tiny_hard.yaml", f"--model.path={model}"),
            *(f"--seed_everything={seed}", f"--run_dir={run_dir}", *shown),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (phase,) = json.loads(result.read_text(encoding="utf-8"))["phases"].values()
    return 100 * phase["avg"]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, nan for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def draw(found: dict[tuple[str, str], dict[int, list[float]]], file: Path) -> None:
    """Draw avg over k, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(model for model, _ in found))
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 4), layout="constrained", squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for source in SOURCES:
            points = {k: mean_and_error(values) for k, values in found[model, source].items()}
            means, errors = [p[0] for p in points.values()], [p[1] for p in points.values()]
            axis.errorbar(list(points), means, yerr=errors, marker="o", capsize=3, label=f"memory: {source}")
        axis.set(title=f"{model}, not trained", xlabel="memory items in the prompt, k", ylabel="avg@16, percent")
        axis.set_ylim(0, 102)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Test every model with every memory at every depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the sweep's block")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tests, the table and the figure")
    parser.add_argument("--model", action="append", required=True, help="a model to test; may be given again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    cases = [(model, source, seed) for model in arguments.model for source in SOURCES for seed in arguments.seeds]
    for model, source, seed in track(cases, description="tests"):
        size = Path(model).name
        scores = found.setdefault((size, source), {k: [] for k in (0, *DEPTHS)})
        bare = arguments.out / f"{size}-no-memory" / f"seed-{seed}"
        scores[0].append(tested(bare, model, seed, None, 0))
        store = arguments.runs / SOURCES[source] / f"seed-{seed}"
        for k in DEPTHS:
            run_dir = arguments.out / f"{size}-{SOURCES[source]}" / f"seed-{seed}"
            scores[k].append(tested(run_dir, model, seed, store, k))
    table = Table(title=f"avg@16 with memory in the prompt, untrained models, {len(arguments.seeds)} seeds")
    for column in ("model", "memory", *(f"k={k}" for k in (0, *DEPTHS))):
        table.add_column(column, justify="right" if column.startswith("k=") else "left")
    for (model, source), scores in found.items():
        cells = [f"{mean:.1f} ± {error:.1f}" for mean, error in map(mean_and_error, scores.values())]
        table.add_row(model, source, *cells)
    Console().print(table)
    draw(found, arguments.out / "transfer.png")


if __name__ == "__main__":
    main()

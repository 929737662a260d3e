"""How do scores grow with more samples? pass@k and headroom (pass@k - maj@k) of a sweep's arms, over its seeds.

    python -m pmd sweep ablations/grids/tiny_table3.yaml
    python benchmarks/curves_tiny.py --runs runs/tiny_table3/hard_world --out docs/scaling_tiny_hard.png

The last checkpoint's samples of the test tasks, without memory in the prompt. Printed: both quantities at k = 1, 4, 8
and 16, mean and standard error over the seeds; drawn: all k. In the paper, PMD keeps gaining with more samples, and its
headroom is 2 to 4 times SDPO's.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pmd.cli.compare import read_run
from pmd.evaluation.metrics import score_samples

SHOWN = (1, 4, 8, 16)
HEADINGS = ("pass@k", "verifier headroom@k = pass@k - maj@k")
Curve = dict[int, tuple[float, float]]  # k -> mean and standard error over the seeds, in percent


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, nan for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def curves_of(arm: Path) -> tuple[int, Curve, Curve]:
    """Return the number of finished seeds of an arm, its pass@k and its headroom."""
    passes: dict[int, list[float]] = {}
    headrooms: dict[int, list[float]] = {}
    finished = sorted(path.parent for path in arm.glob("seed-*/results.json"))
    for run_dir in finished:
        _, samples, problems = read_run(run_dir, "last")
        if problems:
            raise SystemExit("\n".join(problems))
        counts: dict[str, int] = {}
        for sample in samples:
            counts[sample.task_id] = counts.get(sample.task_id, 0) + 1
        scores = score_samples(samples, range(1, min(counts.values()) + 1))
        for k, value in scores.pass_at.items():
            passes.setdefault(k, []).append(100 * value)
            headrooms.setdefault(k, []).append(100 * (value - scores.maj_at[k]))
    curves = [{k: mean_and_error(values) for k, values in by_k.items()} for by_k in (passes, headrooms)]
    return len(finished), curves[0], curves[1]


def draw(found: dict[str, tuple[int, Curve, Curve]], file: Path) -> None:
    """Draw both quantities over k."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for position, (axis, heading) in enumerate(zip(axes, HEADINGS, strict=True)):
        for arm, (_, *curves) in found.items():
            points = curves[position]
            means, errors = ([point[n] for point in points.values()] for n in (0, 1))
            axis.errorbar(list(points), means, yerr=errors, marker=".", capsize=2, label=arm.replace("_", " "))
        axis.set(title=heading, xlabel="k samples", ylabel="percent", xscale="log")
        axis.set_xticks(SHOWN, [str(k) for k in SHOWN])
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Read the runs, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of one block of a sweep")
    parser.add_argument("--out", type=Path, required=True, help="the figure")
    parser.add_argument("--arm", action="append", help="only this arm's folder; may be given again (default: all)")
    arguments = parser.parse_args()
    arms = arguments.arm or sorted(path.name for path in arguments.runs.iterdir() if path.is_dir())
    found = {arm: curves for arm in arms if (curves := curves_of(arguments.runs / arm))[0]}
    if not found:
        raise SystemExit(f"--runs={arguments.runs} holds no finished run; give the folder of a sweep's block.")
    table = Table(title="pass@k / headroom@k of the last checkpoint, no memory in the prompt, in percent")
    for column in ("arm", *(f"k={k}" for k in SHOWN), "seeds"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, (num_seeds, passes, headrooms) in found.items():
        cells = [
            f"{passes[k][0]:.1f} ± {passes[k][1]:.1f} / {headrooms[k][0]:.1f} ± {headrooms[k][1]:.1f}"
            for k in SHOWN
            if k in passes
        ]
        table.add_row(arm, *cells, str(num_seeds))
    Console(width=140).print(table)
    draw(found, arguments.out)


if __name__ == "__main__":
    main()

"""Writes a sweep's report.html: the table, the bars, and the trained arms' learning curves and pass@k, over seeds.

The page lies beside the pictures that it shows, sweep.png, curves.png and pass_at_k.png.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pmd.evaluation.metrics import Sample, pass_at_k
from pmd.evaluation.report import chosen_ks, scored_groups
from pmd.planning.sweep.grid import PlannedRun, row_label
from pmd.planning.sweep.table import COSTS, Row, by_block, chosen_rows, colours_of, cost_cells, estimate, quantity_names
from pmd.run_dir import RunDir

Curve = tuple[list[float], list[float], list[float]]  # x, mean over seeds and its standard error, in percent
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #1d2733 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd }}
td:first-child, th:first-child {{ text-align: left }}
tr.block td {{ font-style: italic; padding-top: 1em }}
tr.best {{ font-weight: bold }}
img {{ max-width: 100% }}
.note {{ color: #666 }}
</style></head><body>
<h1>{title}</h1>
<p class="note">Test tasks, in percent: mean ± standard error over seeds. Bold: an arm's best choice.</p>
{table}
<h2>Bars</h2><img src="sweep.png" alt="scores by arm">
{pictures}
</body></html>
"""


def write_page(runs: Sequence[PlannedRun], rows: Sequence[Row], out: Path, title: str) -> None:
    """Write report.html and the pictures of curves that it shows; sweep.png is there already."""
    shown = {(row.block, row.label) for row in chosen_rows(rows)}
    groups: dict[str, dict[str, list[PlannedRun]]] = defaultdict(dict)
    for run in runs:
        label = row_label(run.arm, run.choices)
        if run.command == "fit" and run.results.is_file() and (run.block, label) in shown:
            groups[run.block].setdefault(run.arm, []).append(run)
    pictures = ""
    for name, heading, unit, curve_of in (
        ("curves", "Learning curves: validation tasks, no memory in the prompt", "optimizer step", _learning_curve),
        ("pass_at_k", "pass@k of the last checkpoint: test tasks, no memory in the prompt", "k samples", _pass_curve),
    ):
        curves = {block: {arm: curve_of(own) for arm, own in arms.items()} for block, arms in groups.items()}
        if any(curve[0] for arms in curves.values() for curve in arms.values()):
            _draw(curves, colours_of(rows), out / f"{name}.png", unit)
            pictures += f'<h2>{escape(heading)}</h2><img src="{name}.png" alt="{escape(heading)}">\n'
    page = PAGE.format(title=escape(title), table=_table(rows), pictures=pictures)
    (out / "report.html").write_text(page, encoding="utf-8")


def _table(rows: Sequence[Row]) -> str:
    names = quantity_names(rows)
    headings = ["method", *names, *COSTS, "seeds"]
    lines = ["<tr>" + "".join(f"<th>{escape(heading)}</th>" for heading in headings) + "</tr>"]
    for block, own in by_block(rows).items():
        if block:
            lines.append(f'<tr class="block"><td colspan="{len(headings)}">{escape(block)}</td></tr>')
        for row in own:
            cells = [row.label, *(str(row.quantities[name]) if name in row.quantities else "-" for name in names)]
            inner = "".join(f"<td>{escape(cell)}</td>" for cell in [*cells, *cost_cells(row), str(row.num_seeds)])
            lines.append(f'<tr class="best">{inner}</tr>' if row.best else f"<tr>{inner}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _learning_curve(runs: Sequence[PlannedRun]) -> Curve:
    """Return the held-out accuracy at each evaluated step that all seeds share."""
    by_step: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        for row in RunDir(run.run_dir).read_metrics():
            if row.get("verify/avg"):
                by_step[float(row["step"]) + 1].append(float(row["verify/avg"]))
    return _over_seeds({step: values for step, values in by_step.items() if len(values) == len(runs)})


def _pass_curve(runs: Sequence[PlannedRun]) -> Curve:
    """Return pass@k of the last checkpoint's samples."""
    by_k: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        groups = scored_groups(_last_samples(RunDir(run.run_dir)))
        for k in chosen_ks(min(map(len, groups))) if groups else []:
            by_k[k].append(float(np.mean([pass_at_k(len(g), sum(s.correct for s in g), k) for g in groups])))
    return _over_seeds({k: values for k, values in by_k.items() if len(values) == len(runs)})


def _last_samples(run_dir: RunDir) -> list[Sample]:
    if not run_dir.samples.is_file():
        return []
    rows = [json.loads(line) for line in run_dir.samples.read_text(encoding="utf-8").splitlines()]
    return [
        Sample(row["task_id"], row["domain"], row["correct"], row["reward"], row["answer"], row["status"])
        for row in rows
        if row["phase"] == "last"
    ]


def _over_seeds(values: Mapping[float, Sequence[float]]) -> Curve:
    xs = sorted(values)
    found = [estimate(values[x]) for x in xs]
    return xs, [100 * e.mean for e in found], [0.0 if math.isnan(e.error) else 100 * e.error for e in found]


def _draw(curves: Mapping[str, Mapping[str, Curve]], colours: Mapping[str, str], file: Path, unit: str) -> None:
    """Draw a panel for each block with a curve for each arm; bands are one standard error to either side."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(7 * len(curves), 4.5), layout="constrained", squeeze=False)
    handles: dict[str, Any] = {}
    for axis, (block, arms) in zip(axes[0], curves.items(), strict=True):
        for arm, (xs, means, errors) in arms.items():
            (handles[arm],) = axis.plot(xs, means, marker=".", color=colours[arm])
            low, high = np.array(means) - errors, np.array(means) + errors
            axis.fill_between(xs, low, high, alpha=0.2, color=colours[arm])
        axis.set(title=block, xlabel=unit, ylabel="percent", ylim=(0, 102))
        axis.grid(alpha=0.3)
        if unit == "k samples":
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)))
    figure.savefig(file, dpi=110)
    plt.close(figure)

"""`python -m pmd compare RUN RUN`: a paired bootstrap of runs on the same questions, as a table, JSON and a plot."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pmd.cli.arguments import make_parser
from pmd.cli.printable import printable
from pmd.errors import ConfigError
from pmd.evaluation.compare import (
    Comparison,
    Difference,
    MethodRun,
    Solved,
    compare,
    mean_correct,
    pass_value,
    question_values,
    solved_sets,
)
from pmd.evaluation.metrics import Sample, score_samples
from pmd.tasks.lines import Line, iterate_lines
from pmd.types import UNSCORED

DESCRIPTION = """Compare runs on the same questions by a paired bootstrap.

  python -m pmd compare runs/grpo runs/pmd
  python -m pmd compare runs/sdpo-0 runs/sdpo-1 runs/pmd-0 runs/pmd-1 --metric pass@8 --out compared

The first run's method is the baseline. Runs with the same method are its seeds. Each run directory holds
results.json (its `method` and `seed`) and samples.jsonl; so do the folders that `pmd test` writes."""


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    parser = make_parser("compare", DESCRIPTION)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories; the first is the baseline")
    parser.add_argument("--phase", default="last", help="checkpoint: last, best, initial, or its name (default: last)")
    parser.add_argument("--metric", default="avg", help="avg, or pass@K (default: avg)")
    parser.add_argument("--resamples", type=int, default=10_000, help="bootstrap resamples (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    parser.add_argument(
        "--out", type=Path, help="folder for compare.json, compare.png and solved.png (default: nothing is written)"
    )
    run(parser.parse_args(argv))
    return 0


def run(options: argparse.Namespace) -> None:
    """Compare the runs, print the table, and write the files that --out asks for.

    Raises:
        ConfigError: with everything wrong with the arguments and the run directories.
    """
    value_of, problems = _value_function(options.metric)
    if len(options.runs) < 2:
        problems.append("RUN: one run cannot be compared; give at least two run directories.")
    if options.resamples < 100:
        problems.append(f"--resamples={options.resamples} must be at least 100; raise it.")
    loaded = []
    for path in options.runs:
        facts, samples, wrong = read_run(path, options.phase)
        problems += wrong
        loaded.append((facts, samples))
    if problems:
        raise ConfigError(problems)
    try:
        runs = [MethodRun(f["method"], f.get("seed"), question_values(samples, value_of)) for f, samples in loaded]
        found = compare(runs, options.seed, options.resamples)
    except ValueError as error:
        raise ConfigError(f"{error}; compare runs of one data set, with as many samples as --metric needs.") from error
    solved = solved_sets([MethodRun(f["method"], f.get("seed"), question_values(s, mean_correct)) for f, s in loaded])
    print_table(found, options)
    print_solved(solved, found[0].method)
    if not options.out:
        print("--out FOLDER keeps the tables as compare.json, and draws them.")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"phase": options.phase, "metric": options.metric, "methods": [dataclasses.asdict(c) for c in found]}
    content["solved"] = [dataclasses.asdict(one) for one in solved]
    (options.out / "compare.json").write_text(json.dumps(content, indent=1) + "\n")
    curves: dict[str, list[Sample]] = {}
    for number, (facts, samples) in enumerate(loaded):  # the number keeps questions of different seeds separate
        renamed = [dataclasses.replace(sample, task_id=f"{number}/{sample.task_id}") for sample in samples]
        curves.setdefault(facts["method"], []).extend(renamed)
    draw(found, curves, options)
    draw_solved(solved, found[0].method, options.out / "solved.png")


def _value_function(metric: str) -> tuple[Any, list[str]]:
    if metric == "avg":
        return mean_correct, []
    name, _, k = metric.partition("@")
    if name == "pass" and k.isdecimal() and int(k) >= 1:
        return pass_value(int(k)), []
    return None, [f"--metric={metric} must be avg or pass@K with K at least 1; for example pass@8."]


def read_run(path: Path, phase: str) -> tuple[dict[str, Any], list[Sample], list[str]]:
    """Return a run's results.json, its samples from one phase, and a sentence for each problem with them."""
    try:
        facts = json.loads((path / "results.json").read_text())
        if not isinstance(facts, dict) or not isinstance(facts.get("method"), str):
            raise ValueError("it names no method")
    except (OSError, ValueError) as error:
        return {}, [], [f"{path}: results.json cannot be used ({error}); give the directory of a finished run."]
    samples, problems, phases = [], [], set[str]()
    for line in iterate_lines(path / "samples.jsonl"):
        if isinstance(line, str):
            problems.append(line)
            continue
        phases.add(str(line.fields.get("phase")))
        if line.fields.get("phase") == phase and line.fields.get("status") not in UNSCORED:
            sample = _read_sample(line)
            if isinstance(sample, str):
                problems.append(sample)
            else:
                samples.append(sample)
    if not samples and not problems:
        held = ", ".join(sorted(phases)) or "none"
        problems.append(f"{path}: samples.jsonl has no sample of --phase={phase}; it has {held}.")
    return facts, samples, problems


def _read_sample(line: Line) -> Sample | str:
    row = line.fields
    fits = {"task_id": str, "domain": str, "correct": bool, "reward": int | float, "answer": str | None}
    for name, kind in fits.items():
        if not isinstance(row.get(name), kind):
            return line.problem(name, "is not what `pmd fit` writes", "repeat the evaluation with `pmd test`")
    return Sample(row["task_id"], row["domain"], row["correct"], float(row["reward"]), row["answer"])


def print_table(found: Sequence[Comparison], options: argparse.Namespace, console: Console | None = None) -> None:
    """Print one row per method: its value, the difference to the baseline, interval and p."""
    domains = list(found[0].by_domain) if len(found[0].by_domain) > 1 else []
    title = f"{options.metric}, {options.phase} checkpoint, {found[0].num_questions} questions, in percent"
    table = Table(title=Text(printable(title)))
    table.add_column("method")
    for heading in ["runs", "pooled", *(["domain mean"] if domains else []), *domains]:
        table.add_column(Text(printable(heading)), justify="right")
    for heading in (f"against {found[0].method}", "95 % interval", "p"):
        table.add_column(Text(printable(heading)), justify="right")
    for one in found:
        difference = one.domain_mean_difference if domains else one.pooled_difference
        values = [one.pooled, *([one.domain_mean] if domains else []), *(one.by_domain[name] for name in domains)]
        cells = [one.method, str(one.num_runs), *(f"{100 * value:.1f}" for value in values)]
        table.add_row(*(Text(printable(cell)) for cell in (*cells, *_cells(difference))))
    console = console or Console()
    console.print(table)
    which = "the plain mean of the domains" if domains else "the mean over questions"
    console.print(f"Differences of {which}: paired bootstrap, {options.resamples} resamples of questions and seeds.")


def print_solved(solved: Sequence[Solved], baseline: str, console: Console | None = None) -> None:
    """Print how many questions a method, the baseline, both or neither solve."""
    if not solved:
        return
    table = Table(title=Text(printable(f"questions solved, in percent, beside {baseline}")))
    for heading in ("method", "solved by"):
        table.add_column(heading)
    for heading in ("both", "the method alone", f"{baseline} alone", "neither"):
        table.add_column(Text(printable(heading)), justify="right")
    for one in solved:
        shares = (one.both, one.only_method, one.only_baseline, one.neither)
        cells = (one.method, one.criterion, *(f"{100 * share:.1f}" for share in shares))
        table.add_row(*(Text(printable(cell)) for cell in cells))
    (console or Console()).print(table)


def draw_solved(solved: Sequence[Solved], baseline: str, path: Path) -> None:
    """Draw a bar for each method and criterion: the questions that both, one or neither solve."""
    if not solved:
        return
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 1.5 + 0.5 * len(solved)), layout="constrained")
    names = [f"{one.method}: {one.criterion}" for one in solved]
    left = np.zeros(len(solved))
    parts = ("both", "only_method", "only_baseline", "neither")
    labels = ("both", "the method alone", f"{baseline} alone", "neither")
    for part, label, color in zip(parts, labels, ("tab:green", "tab:blue", "tab:orange", "lightgray"), strict=True):
        shares = np.array([100 * getattr(one, part) for one in solved])
        axis.barh(names, shares, left=left, label=label, color=color)
        left += shares
    axis.invert_yaxis()
    axis.set(xlabel="percent of questions", xlim=(0, 100), title=f"questions solved, beside {baseline}")
    figure.legend(loc="outside lower center", ncols=len(parts))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _cells(difference: Difference | None) -> tuple[str, str, str]:
    if difference is None:
        return "-", "-", "-"
    interval = f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    return f"{100 * difference.difference:+.1f}", interval, f"{difference.p_value:.4f}"


def draw(found: Sequence[Comparison], samples: dict[str, list[Sample]], options: argparse.Namespace) -> None:
    """Draw compare.png: differences with their intervals, pooled and per domain, and pass@k of every method."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False
    import matplotlib.pyplot as plt

    rows = [(f"{c.method}: {name}", difference) for c in found[1:] for name, difference in _differences(c)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 2 + 0.35 * max(6, len(rows))), layout="constrained")
    for height, (_, difference) in enumerate(reversed(rows)):
        left.plot([100 * difference.low, 100 * difference.high], [height, height], color="tab:blue")
        left.plot(100 * difference.difference, height, "o", color="tab:blue")
    left.axvline(0, color="gray", linewidth=0.8)
    left.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    left.set(title=f"{options.metric} against {found[0].method}, 95 % interval", xlabel="percentage points")
    for method, own in samples.items():
        scores = score_samples(own, ks=[1, 2, 4, 8, 16, 32, 64])
        ks, values = list(scores.pass_at), 100 * np.array(list(scores.pass_at.values()))
        errors = 100 * np.array(list(scores.pass_at_error.values()))
        right.plot(ks, values, marker="o", label=method)
        right.fill_between(ks, values - errors, values + errors, alpha=0.2)
    right.set(title="pass@k, with its standard error", xlabel="k samples", ylabel="percent of tasks")
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:.0f}")
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(options.out / "compare.png", dpi=110)
    plt.close(figure)


def _differences(comparison: Comparison) -> list[tuple[str, Difference]]:
    rows = [("pooled", comparison.pooled_difference)]
    if comparison.domain_differences and len(comparison.domain_differences) > 1:
        rows += [("domain mean", comparison.domain_mean_difference), *comparison.domain_differences.items()]
    return [(name, difference) for name, difference in rows if difference is not None]

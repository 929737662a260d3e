"""Reports the results of a run: results.json, samples.jsonl, the terminal table, curves.png and pass_at_k.png."""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pmd.atomic import replace_text, replacing
from pmd.evaluation.costs import cost_of
from pmd.evaluation.metrics import (
    Sample,
    Scores,
    chance_scores,
    clustered_error,
    coverage_at_k,
    group_by_task,
    maj_at_k,
    pass_at_k,
)
from pmd.run_dir import GENERATED, RunDir, write_json
from pmd.types import UNSCORED, Task

PHASES = {"initial": "before training", "last": "last checkpoint", "best": "best checkpoint"}
ELSEWHERE = "_other_domains"  # ends the names of phases whose tasks are of domains without training tasks
MAX_POINTS = 64  # of a curve over k


@dataclass(frozen=True, slots=True)
class Phase:
    """The test tasks at one point of a run: samples without memory, and the memory-conditioned score."""

    samples: Sequence[Sample]
    scores: Scores
    memory_conditioned: float | None = None  # avg with memory in the prompt

    def as_json(self) -> dict[str, Any]:
        """Return the scores as plain values: pooled, by domain, and averaged over domains."""
        by_domain = {domain: _plain_scores(scores) for domain, scores in self.scores.by_domain.items()}
        domain_mean = _mean_of(list(by_domain.values())) | {"avg_error": self.scores.domain_avg_error}
        return _plain_scores(self.scores) | {
            "memory_conditioned": self.memory_conditioned,
            "num_unscored": self.scores.num_unscored,
            "by_domain": by_domain,
            "domain_mean": domain_mean,
        }


def _plain_scores(scores: Scores) -> dict[str, Any]:
    at_k = {
        "pass_at": scores.pass_at,
        "pass_at_error": scores.pass_at_error,
        "headroom_at": scores.headroom_at,
        "verifier_headroom_at": scores.verifier_headroom_at,
        "best_of": scores.best_of,
        "maj_at": scores.maj_at,
        "coverage_at": scores.coverage_at,
    }
    return {
        "avg": scores.avg,
        "avg_error": scores.avg_error,
        "reward": scores.reward,
        "valid_rate": scores.valid_rate,
        "passed_tests": scores.passed_tests,
        "procedural_words": scores.procedural_rate,
        "num_tasks": scores.num_tasks,
        "num_samples": scores.num_samples,
    } | {name: {str(k): value for k, value in values.items()} for name, values in at_k.items()}


def _mean_of(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average the scores of several domains: @k values that every domain has, without errors and counts."""
    means: dict[str, Any] = {}
    for name, value in parts[0].items():
        if isinstance(value, dict) and not name.endswith("_error"):
            shared = [k for k in value if all(k in part[name] for part in parts)]
            means[name] = {k: sum(part[name][k] for part in parts) / len(parts) for k in shared}
        elif isinstance(value, float) and not name.endswith("_error"):
            means[name] = sum(part[name] for part in parts) / len(parts)
    return means


def results_of(facts: Mapping[str, Any], phases: Mapping[str, Phase]) -> dict[str, Any]:
    """Return the content of results.json."""
    return _finite(dict(facts) | {"phases": {name: phase.as_json() for name, phase in phases.items()}})


def write_results(run_dir: RunDir, results: Mapping[str, Any], phases: Mapping[str, Phase]) -> None:
    """Write samples.jsonl, then results.json, which marks a finished run."""
    lines = []
    for name, phase in phases.items():
        counts: dict[str, int] = {}
        for sample in phase.samples:
            number = counts[sample.task_id] = counts.get(sample.task_id, -1) + 1
            row = {"phase": name, "task_id": sample.task_id, "domain": sample.domain, "sample": number}
            row |= {"correct": sample.correct, "reward": sample.reward, "answer": sample.answer}
            row |= {"status": sample.status}
            row |= {"tests": dataclasses.asdict(sample.tests)} if sample.tests else {}
            lines.append(json.dumps(row) + "\n")
    try:
        replace_text(run_dir.samples, "".join(lines))
    finally:
        write_json(run_dir.results, results)


def sum_costs(run_dir: RunDir) -> dict[str, float]:
    """Return what training cost over the whole run: seconds by part, tokens that the policy generated."""
    totals: dict[str, float] = defaultdict(float)
    for row in run_dir.read_metrics():
        for name, value in row.items():
            if value and (name.startswith("time/") or name in GENERATED):
                totals[name] += float(value)
    return {name: round(value, 3) for name, value in sorted(totals.items())}


def print_table(results: Mapping[str, Any], chance: Mapping[str, Any] | None, console: Console | None = None) -> None:
    """Print the final table: one row per phase with its domains below it, and the score of guessing.

    Scores are without memory in the prompt, unless the results name the memory that was shown; a column shows the score
    with memory if it was measured.
    """
    console = console or Console()
    shown, best_is_last = _distinct(results["phases"])
    phases = {phase_label(name, results): phase for name, phase in shown.items()}
    first = next(iter(phases.values()))
    max_k = max(first["pass_at"], key=int, default="1")
    columns = _columns(list(phases.values()), [k for k in first["pass_at"] if k != "1"], max_k)
    num_each = first["num_samples"] // first["num_tasks"]
    split = results.get("split", "test")
    title = f"{results['method']}: {first['num_tasks']} {split} tasks x {num_each} samples, {prompt_label(results)}"
    width = min(len(title), console.width)  # so that the title stays on one line where it can
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), min_width=width)
    table.add_column("", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, phase in phases.items():
        table.add_row(escape(str(name)), *(_cell(phase, keys) for keys in columns.values()))
        if len(phase["by_domain"]) > 1:
            for domain, scores in (phase["by_domain"] | {"mean of domains": phase["domain_mean"]}).items():
                table.add_row(f"  {escape(domain)}", *(_cell(scores, keys) for keys in columns.values()))
    if chance is not None:
        guessing = {name: {str(k): v for k, v in chance[name].items()} for name in ("pass_at", "coverage_at")}
        table.add_row("chance", *(_cell({"avg": chance["avg"]} | guessing, keys) for keys in columns.values()))
    console.print(table)
    if best_is_last:
        console.print(f"The {phase_label('best', results)} is the last one.")
    for name, phase in phases.items():
        if phase["num_unscored"]:
            left_out = f"{phase['num_unscored']} samples could not be verified and are left out of all scores"
            console.print(f"{name}: {left_out}", markup=False)
    if cost := cost_of(results):
        console.print(str(cost), markup=False)


def _distinct(phases: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Leave out the best checkpoint's phases where they repeat those of the last; return whether they did."""
    scores = {name: phase | {"memory_conditioned": None} for name, phase in phases.items()}
    repeated = [
        name
        for name in phases
        if name.startswith("best") and scores[name] == scores.get(name.replace("best", "last", 1))
    ]
    return {name: phase for name, phase in phases.items() if name not in repeated}, bool(repeated)


def phase_label(name: str, results: Mapping[str, Any]) -> str:
    """Return the name of a phase in tables; it says so where the best checkpoint was chosen on the test tasks."""
    chosen_on_test = name.startswith("best") and results.get("selected_on") == "test"
    start = next((known for known in PHASES if name == known or name == known + ELSEWHERE), None)
    label = name if start is None else PHASES[start] + (", other domains" if name.endswith(ELSEWHERE) else "")
    return label + (" (chosen on test)" if chosen_on_test else "")


def prompt_label(results: Mapping[str, Any]) -> str:
    """Return what tables and figures say of memory in the student's prompt."""
    shown = results.get("memory")
    return "no memory in the prompt" if not shown else f"WITH MEMORY in the prompt: {shown['store']}, k={shown['k']}"


def _columns(phases: Sequence[Mapping[str, Any]], ks: Sequence[str], max_k: str) -> dict[str, tuple[str, ...]]:
    """Return each heading, wrapped to fit a terminal, with the keys of its value; absent scores get no column."""
    # A verifier that only gives rewards extracts no answer, also from what is right: nothing can be said of answers.
    has_answers = any(phase["valid_rate"] for phase in phases) or not any(phase["avg"] for phase in phases)
    columns: dict[str, tuple[str, ...]] = {"avg": ("avg",), "± s.e.": ("avg_error",)}
    columns |= {f"pass\n@{k}": ("pass_at", k) for k in ks}
    if max_k != "1":
        columns[f"head-\nroom\n@{max_k}"] = ("headroom_at", max_k)
    if any(phase["passed_tests"] is not None for phase in phases):
        columns |= {f"best\nof {max_k}": ("best_of", max_k), "tests\npassed": ("passed_tests",)}
    elif has_answers:
        columns |= {f"maj\n@{max_k}": ("maj_at", max_k)}
        if max_k != "1":
            columns[f"pass-\nmaj\n@{max_k}"] = ("verifier_headroom_at", max_k)
        columns[f"cover-\nage\n@{max_k}"] = ("coverage_at", max_k)
    if has_answers:
        columns["valid"] = ("valid_rate",)
    if any(phase["memory_conditioned"] is not None for phase in phases):
        columns["with\nmem-\nory"] = ("memory_conditioned",)
    return columns


def _cell(scores: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    value: Any = scores
    for key in keys:
        value = value.get(key) if value else None
    if value is None:
        return "-"
    return f"{value:.2f}" if keys[0] == "coverage_at" else f"{100 * value:.1f}"


def draw_curves(run_dir: RunDir, title: str) -> None:
    """Draw curves.png from metrics.csv: held-out accuracy, training reward, memory."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names are shown as they are, dollar signs included
    import matplotlib.pyplot as plt

    rows = run_dir.read_metrics()
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    memory_labels = {f"memory/{name}": name for name in ("insights", "behaviours", "experiences")}
    accuracy_labels = {"verify/avg": "without memory", "verify/memory_conditioned_avg": "memory in the prompt"}
    panels = [
        ("held-out accuracy", accuracy_labels),
        ("training rollouts", {"rollout/reward": "reward", "rollout/solved_groups": "groups with a success"}),
        ("memory", memory_labels),
    ]  # fmt: skip
    for axis, (heading, names) in zip(axes, panels, strict=True):
        for name, label in names.items():
            points = [(float(r["step"]) + 1, float(r[name])) for r in rows if r.get(name)]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 60 else None)
        axis.set(title=heading, xlabel="optimizer step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    for axis in axes[:2]:
        axis.set_ylim(0, 1.02)
    figure.suptitle(title)
    _save(figure, run_dir.curves)


def draw_pass_at(
    path: Path, samples_by_name: Mapping[str, Sequence[Sample]], tasks: Sequence[Task], title: str
) -> None:
    """Draw pass@k, headroom@k and, if answers are extracted, coverage@k over k: how the scores grow with more samples.

    Bands are one standard error to either side, clustered by question; the dashed line is guessing, where the tasks are
    multiple choice.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names are shown as they are, dollar signs included
    import matplotlib.pyplot as plt

    groups = {name: scored_groups(samples) for name, samples in samples_by_name.items()}
    ks = {name: chosen_ks(min(map(len, own))) for name, own in groups.items()}
    has_answers = any(sample.answer is not None for own in groups.values() for group in own for sample in group)
    panels: list[tuple[str, str, Callable[[Sequence[Sample], int], float]]] = [
        ("pass@k", "percent of tasks", lambda g, k: 100 * _pass(g, k)),
        ("headroom@k = pass@k - avg", "percentage points", lambda g, k: 100 * (_pass(g, k) - _pass(g, 1))),
    ]
    if has_answers:
        panels.append(("verifier headroom@k = pass@k - maj@k", "percentage points", _verifier_headroom))
        panels.append(("coverage@k", "distinct answers", lambda g, k: coverage_at_k([s.answer for s in g], k)))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (heading, unit, value_of) in zip(axes[0], panels, strict=True):
        for name, own in groups.items():
            values = np.array([[value_of(group, k) for group in own] for k in ks[name]])  # [k, tasks]
            means, errors = values.mean(axis=1), [clustered_error(row) for row in values]
            axis.plot(ks[name], means, marker=".", label=name)
            axis.fill_between(ks[name], means - errors, means + errors, alpha=0.2)
        _draw_chance(axis, heading, tasks, max(ks.values(), key=len))
        axis.set(title=heading, xlabel="k samples", ylabel=unit)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and free it."""
    import matplotlib.pyplot as plt

    try:
        with replacing(path) as file:
            figure.savefig(file, dpi=110, format="png")
    finally:
        plt.close(figure)


def scored_groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Return the scored samples of each task."""
    return group_by_task([sample for sample in samples if sample.status not in UNSCORED])


def chosen_ks(max_k: int) -> list[int]:
    """Return the values of k to draw, from 1 to `max_k`, spaced evenly on a log scale."""
    return sorted({round(k) for k in np.geomspace(1, max_k, min(max_k, MAX_POINTS))} | {max_k})


def _pass(group: Sequence[Sample], k: int) -> float:
    return pass_at_k(len(group), sum(sample.correct for sample in group), k)


def _verifier_headroom(group: Sequence[Sample], k: int) -> float:
    return 100 * (_pass(group, k) - maj_at_k([(sample.answer, sample.correct) for sample in group], k))


def _draw_chance(axis: Any, heading: str, tasks: Sequence[Task], ks: Sequence[int]) -> None:
    chance = chance_scores(tasks, ks)
    if chance is None or heading.startswith("verifier"):
        return
    values = [100 * value for value in chance["pass_at"].values()]
    if heading.startswith("headroom"):
        values = [value - 100 * chance["avg"] for value in values]
    if heading.startswith("coverage"):
        values = list(chance["coverage_at"].values())
    axis.plot(ks, values, "--", color="gray", label="guessing")


def _finite(value: Any) -> Any:
    """Replace NaN and infinity with None, because JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

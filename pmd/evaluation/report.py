"""What a run leaves for people: results.json, samples.jsonl, the table in the terminal, curves.png."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pmd.evaluation.metrics import Sample, Scores
from pmd.run_dir import RunDir, write_json

PHASES = {"initial": "before training", "last": "last checkpoint", "best": "best checkpoint"}


@dataclass(frozen=True, slots=True)
class Phase:
    """The test problems at one moment of a run: memory-free samples, and the memory-conditioned score."""

    samples: Sequence[Sample]
    scores: Scores
    memory_conditioned: float | None = None  # avg with memory in the prompt

    def as_json(self) -> dict[str, Any]:
        """Return the scores as plain values."""
        scores = self.scores
        return {
            "avg": scores.avg,
            "avg_error": scores.avg_error,
            "pass_at": {str(k): v for k, v in scores.pass_at.items()},
            "maj_at": {str(k): v for k, v in scores.maj_at.items()},
            "coverage_at": {str(k): v for k, v in scores.coverage_at.items()},
            "valid_rate": scores.valid_rate,
            "memory_conditioned": self.memory_conditioned,
            "num_tasks": scores.num_tasks,
            "num_samples": scores.num_samples,
            "by_domain": {d: {"avg": s.avg, "avg_error": s.avg_error} for d, s in scores.by_domain.items()},
        }


def write_results(run_dir: RunDir, facts: Mapping[str, Any], phases: Mapping[str, Phase]) -> dict[str, Any]:
    """Write samples.jsonl and results.json; return what results.json holds."""
    with run_dir.samples.open("w", encoding="utf-8") as file:
        for name, phase in phases.items():
            counts: dict[str, int] = {}
            for sample in phase.samples:
                number = counts[sample.task_id] = counts.get(sample.task_id, -1) + 1
                row = {"phase": name, "task_id": sample.task_id, "domain": sample.domain, "sample": number}
                row |= {"correct": sample.correct, "reward": sample.reward, "answer": sample.answer}
                file.write(json.dumps(row) + "\n")
    results = dict(facts) | {"phases": {name: phase.as_json() for name, phase in phases.items()}}
    write_json(run_dir.results, _finite(results))
    return results


def print_table(results: Mapping[str, Any], chance: float | None, console: Console | None = None) -> None:
    """Print the final table: one row per moment, the test problems without memory, and with it beside."""
    first = next(iter(results["phases"].values()))
    ks = [k for k in first["pass_at"] if k != "1"] or ["1"]  # pass@1 is avg
    table = Table(title=f"{results['method']}: {first['num_tasks']} test problems x "
                  f"{first['num_samples'] // first['num_tasks']} samples, no memory in the prompt")  # fmt: skip
    table.add_column("", no_wrap=True)
    for heading in ["avg", "± s.e.", *(f"pass@{k}" for k in ks), f"coverage@{ks[-1]}", "valid", "with memory"]:
        table.add_column(heading, justify="right")
    for name, phase in results["phases"].items():
        conditioned = phase["memory_conditioned"]
        table.add_row(
            PHASES.get(name, name),
            _percent(phase["avg"]),
            _percent(phase["avg_error"]),
            *(_percent(phase["pass_at"][k]) for k in ks),
            f"{phase['coverage_at'][ks[-1]]:.2f}",
            _percent(phase["valid_rate"]),
            "-" if conditioned is None else _percent(conditioned),
        )
    if chance is not None:
        table.add_row("chance", _percent(chance), *[""] * (len(ks) + 4))
    (console or Console()).print(table)


def draw_curves(run_dir: RunDir, title: str) -> None:
    """Draw curves.png from metrics.csv: held-out accuracy, training reward, memory."""
    import matplotlib

    matplotlib.use("Agg")
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
    figure.savefig(run_dir.curves, dpi=110)
    plt.close(figure)


def _percent(value: float) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _finite(value: Any) -> Any:
    """Replace NaN by null: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value

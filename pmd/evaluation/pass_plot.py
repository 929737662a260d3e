"""The picture of test-time scaling: samples of one or more policies enter; pass_at_k.png leaves.

Bands are one standard error to either side, clustered by question. Dashed is what guessing scores, where the problems
are multiple choice.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pmd.evaluation.chance import chance_scores
from pmd.evaluation.metrics import Sample, clustered_error, coverage_at_k, group_by_task, pass_at_k
from pmd.types import UNSCORED, Task

MOST_POINTS = 64


def draw_pass_at(
    path: Path, samples_by_name: Mapping[str, Sequence[Sample]], tasks: Sequence[Task], title: str
) -> None:
    """Draw pass@k, headroom@k and, where answers are extracted, coverage@k against k."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {name: scored_groups(samples) for name, samples in samples_by_name.items()}
    ks = {name: chosen_ks(min(map(len, own))) for name, own in groups.items()}
    has_answers = any(sample.answer is not None for own in groups.values() for group in own for sample in group)
    panels: list[tuple[str, str, Callable[[Sequence[Sample], int], float]]] = [
        ("pass@k", "percent of problems", lambda g, k: 100 * _pass(g, k)),
        ("headroom@k = pass@k - avg", "percentage points", lambda g, k: 100 * (_pass(g, k) - _pass(g, 1))),
    ]
    if has_answers:
        panels.append(("coverage@k", "distinct answers", lambda g, k: coverage_at_k([s.answer for s in g], k)))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (heading, unit, value_of) in zip(axes[0], panels, strict=True):
        for name, own in groups.items():
            values = np.array([[value_of(group, k) for group in own] for k in ks[name]])  # [k, problems]
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
    figure.savefig(path, dpi=110)
    plt.close(figure)


def scored_groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Return the samples of each problem whose verdicts say something."""
    return group_by_task([sample for sample in samples if sample.status not in UNSCORED])


def chosen_ks(most: int) -> list[int]:
    """Return every k up to `most`, thinned to a drawable number."""
    return sorted({round(k) for k in np.geomspace(1, most, min(most, MOST_POINTS))} | {most})


def _pass(group: Sequence[Sample], k: int) -> float:
    return pass_at_k(len(group), sum(sample.correct for sample in group), k)


def _draw_chance(axis: Any, heading: str, tasks: Sequence[Task], ks: Sequence[int]) -> None:
    chance = chance_scores(tasks, ks)
    if chance is None:
        return
    values = [100 * value for value in chance["pass_at"].values()]
    if heading.startswith("headroom"):
        values = [value - 100 * chance["avg"] for value in values]
    if heading.startswith("coverage"):
        values = list(chance["coverage_at"].values())
    axis.plot(ks, values, "--", color="gray", label="guessing")

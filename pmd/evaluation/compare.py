"""Compare methods on the same questions: per-question values of their runs enter, differences with intervals leave.

Paired bootstrap: questions are redrawn with replacement within their domain, the same draw for every method; runs of
one method with several seeds are redrawn as an outer level. Where both methods ran the same seeds, the seeds are
paired too. Intervals are percentiles of the redrawn differences.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pmd.evaluation.metrics import Sample, pass_at_k
from pmd.seeds import derive_seed

RESAMPLES = 10_000
#: Resamples drawn at once: bounds the memory at any number of questions.
CHUNK = 500


@dataclass(frozen=True, slots=True)
class Question:
    """One question's value in one run."""

    domain: str
    value: float


@dataclass(frozen=True, slots=True)
class MethodRun:
    """One run of a method: its questions by task id. Runs of one method differ by seed."""

    method: str
    seed: int | None
    questions: Mapping[str, Question]


@dataclass(frozen=True, slots=True)
class Difference:
    """A method against the baseline, in the unit of the values."""

    difference: float
    low: float  # 95 % interval
    high: float
    p_value: float  # two-sided: twice the smaller share of resamples on either side of 0
    error: float  # standard deviation of the resamples


@dataclass(frozen=True, slots=True)
class Comparison:
    """One method: its own value, and against the baseline (None for the baseline itself)."""

    method: str
    num_runs: int
    num_questions: int
    pooled: float  # every question counts alike
    domain_mean: float  # every domain counts alike
    by_domain: dict[str, float]
    pooled_difference: Difference | None = None
    domain_mean_difference: Difference | None = None
    domain_differences: dict[str, Difference] | None = None


def question_values(samples: Sequence[Sample], value_of: Callable[[Sequence[Sample]], float]) -> dict[str, Question]:
    """Group samples by question and give each its value."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.task_id].append(sample)
    return {task_id: Question(group[0].domain, value_of(group)) for task_id, group in groups.items()}


def mean_correct(samples: Sequence[Sample]) -> float:
    """Return the question's share of correct samples: what avg@k averages."""
    return sum(sample.correct for sample in samples) / len(samples)


def pass_value(k: int) -> Callable[[Sequence[Sample]], float]:
    """Return the function that gives a question's pass@k."""
    return lambda samples: pass_at_k(len(samples), sum(sample.correct for sample in samples), k)


def compare(runs: Sequence[MethodRun], seed: int = 0, resamples: int = RESAMPLES) -> list[Comparison]:
    """Compare every method with the first one. The runs of a method must hold the questions of all others.

    Raises:
        ValueError: if two runs do not hold the same questions.
    """
    task_ids = sorted(runs[0].questions)
    for run in runs:
        if sorted(run.questions) != task_ids:
            raise ValueError(f"a run of {run.method} holds other questions than the first run of {runs[0].method}")
    domains = np.array([runs[0].questions[task_id].domain for task_id in task_ids])
    by_method: dict[str, list[MethodRun]] = defaultdict(list)
    for run in runs:
        by_method[run.method].append(run)
    values = {
        method: np.array([[run.questions[task_id].value for task_id in task_ids] for run in own])  # [runs, questions]
        for method, own in by_method.items()
    }
    baseline = runs[0].method
    return [
        _compare_one(method, baseline, by_method, values, domains, derive_seed(seed, "compare", method), resamples)
        for method in by_method
    ]


def _compare_one(
    method: str,
    baseline: str,
    runs: Mapping[str, Sequence[MethodRun]],
    values: Mapping[str, np.ndarray],
    domains: np.ndarray,
    seed: int,
    resamples: int,
) -> Comparison:
    own = values[method]
    names = sorted(set(domains.tolist()))
    by_domain = {name: float(own[:, domains == name].mean()) for name in names}
    plain = Comparison(
        method, len(own), own.shape[1], float(own.mean()), float(np.mean(list(by_domain.values()))), by_domain
    )
    if method == baseline:
        return plain
    ours, theirs = _paired(runs[method], runs[baseline], own, values[baseline])
    drawn = bootstrap(ours, theirs, domains, np.random.default_rng(seed), resamples)  # [resamples, domains]
    observed = np.array([(ours[:, domains == n].mean() - theirs[:, domains == n].mean()) for n in names])
    sizes = np.array([(domains == name).mean() for name in names])
    return Comparison(
        *(plain.method, plain.num_runs, plain.num_questions, plain.pooled, plain.domain_mean, plain.by_domain),
        pooled_difference=_summarise(float(observed @ sizes), drawn @ sizes),
        domain_mean_difference=_summarise(float(observed.mean()), drawn.mean(axis=1)),
        domain_differences={n: _summarise(float(observed[i]), drawn[:, i]) for i, n in enumerate(names)},
    )


def _paired(
    ours: Sequence[MethodRun], theirs: Sequence[MethodRun], our_values: np.ndarray, their_values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Order both methods' runs by seed where they ran the same seeds, so that the outer draw can pair them."""
    our_order, their_order = (
        sorted(range(len(r)), key=lambda i, r=r: (r[i].seed is None, r[i].seed)) for r in (ours, theirs)
    )
    return our_values[our_order], their_values[their_order]


def bootstrap(
    ours: np.ndarray, theirs: np.ndarray, domains: np.ndarray, generator: np.random.Generator, resamples: int
) -> np.ndarray:
    """Return redrawn differences of the means, one column per domain in sorted order: [resamples, domains].

    With equally many runs on both sides, runs are drawn in pairs; else independently.
    """
    columns = [np.flatnonzero(domains == name) for name in sorted(set(domains.tolist()))]
    paired = len(ours) == len(theirs)
    parts = []
    for start in range(0, resamples, CHUNK):
        count = min(CHUNK, resamples - start)
        our_runs = _weights(generator, len(ours), count)
        their_runs = our_runs if paired else _weights(generator, len(theirs), count)
        part = np.empty((count, len(columns)))
        for number, column in enumerate(columns):
            questions = _weights(generator, len(column), count)  # [count, questions]
            our_means, their_means = questions @ ours[:, column].T, questions @ theirs[:, column].T
            part[:, number] = (our_means * our_runs).sum(axis=1) - (their_means * their_runs).sum(axis=1)
        parts.append(part)
    return np.concatenate(parts)


def _weights(generator: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Return how often each of `size` things is drawn in `size` draws, divided by `size`: [count, size]."""
    return generator.multinomial(size, np.full(size, 1 / size), size=count) / size


def _summarise(observed: float, drawn: np.ndarray) -> Difference:
    low, high = np.percentile(drawn, [2.5, 97.5])
    p_value = min(1.0, 2 * min(float((drawn <= 0).mean()), float((drawn >= 0).mean())))
    return Difference(observed, float(low), float(high), max(p_value, 1 / len(drawn)), float(drawn.std()))

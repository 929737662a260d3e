"""Compares methods on the same questions with a paired bootstrap: differences, intervals, p-values.

Questions are resampled with replacement within their domain, with the same draw for every method; runs of one method
with several seeds are resampled as an outer level. If both methods ran the same seeds, the seeds are paired too.
Intervals are percentiles of the resampled differences.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pmd.evaluation.metrics import Sample, pass_at_k
from pmd.seeds import derive_seed

RESAMPLES = 10_000
#: Resamples drawn at once; bounds the memory for any number of questions.
CHUNK = 500


@dataclass(frozen=True, slots=True)
class Question:
    """The value of one question in one run."""

    domain: str
    value: float


@dataclass(frozen=True, slots=True)
class MethodRun:
    """One run of a method, with its questions by task id. Runs of one method differ in their seed."""

    method: str
    seed: int | None
    questions: Mapping[str, Question]


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between a method and the baseline, in the unit of the values."""

    difference: float
    low: float  # 95 % interval
    high: float
    p_value: float  # two-sided: twice the smaller share of resamples on either side of 0
    error: float  # standard deviation of the resamples


@dataclass(frozen=True, slots=True)
class Comparison:
    """One method: its own value, and its differences from the baseline (None for the baseline itself)."""

    method: str
    num_runs: int
    num_questions: int
    pooled: float  # every question has the same weight
    domain_mean: float  # every domain has the same weight
    by_domain: dict[str, float]
    pooled_difference: Difference | None = None
    domain_mean_difference: Difference | None = None
    domain_differences: dict[str, Difference] | None = None


@dataclass(frozen=True, slots=True)
class Solved:
    """Which questions a method and the baseline solve: shares of all questions, averaged over pairs of runs."""

    method: str
    criterion: str  # when a question counts as solved
    both: float
    only_method: float
    only_baseline: float
    neither: float
    only_method_ids: tuple[str, ...]  # questions that the method alone solves, in any pair of runs
    only_baseline_ids: tuple[str, ...]


#: When a question counts as solved, by name: whether the share of its samples that are correct is enough.
CRITERIA: dict[str, Callable[[float], bool]] = {
    "at least one sample": lambda share: share > 0,
    "most samples": lambda share: share > 0.5,
}


def solved_sets(runs: Sequence[MethodRun]) -> list[Solved]:
    """Compare what each method solves with what that of the first run solves, by each of `CRITERIA`.

    Runs are paired by seed if both methods ran it, else with every run on the same questions.

    Args:
        runs: with the share of correct samples (`mean_correct`) as the value of each question.
    """
    by_method: dict[str, list[MethodRun]] = defaultdict(list)
    for run in runs:
        by_method[run.method].append(run)
    baseline = by_method.pop(runs[0].method)
    return [
        _solved(method, criterion, _pairs(own, baseline)) for method, own in by_method.items() for criterion in CRITERIA
    ]


def _pairs(own: Sequence[MethodRun], baseline: Sequence[MethodRun]) -> list[tuple[MethodRun, MethodRun]]:
    pairs = []
    for run in own:
        alike = [other for other in baseline if other.questions.keys() == run.questions.keys()]
        pairs += [(run, other) for other in [o for o in alike if o.seed == run.seed] or alike]
    return pairs


def _solved(method: str, criterion: str, pairs: Sequence[tuple[MethodRun, MethodRun]]) -> Solved:
    counts, total = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}, 0
    alone: dict[tuple[bool, bool], set[str]] = defaultdict(set)
    for one, other in pairs:
        for task_id, question in one.questions.items():
            solves = CRITERIA[criterion]
            solved = solves(question.value), solves(other.questions[task_id].value)
            counts[solved] += 1
            alone[solved].add(task_id)
            total += 1
    shares = {solved: number / max(1, total) for solved, number in counts.items()}
    return Solved(
        method,
        criterion,
        both=shares[True, True],
        only_method=shares[True, False],
        only_baseline=shares[False, True],
        neither=shares[False, False],
        only_method_ids=tuple(sorted(alone[True, False])),
        only_baseline_ids=tuple(sorted(alone[False, True])),
    )


def question_values(samples: Sequence[Sample], value_of: Callable[[Sequence[Sample]], float]) -> dict[str, Question]:
    """Group samples by question and compute the value of each."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.task_id].append(sample)
    return {task_id: Question(group[0].domain, value_of(group)) for task_id, group in groups.items()}


def mean_correct(samples: Sequence[Sample]) -> float:
    """Return the question's share of correct samples, which avg@k averages."""
    return sum(sample.correct for sample in samples) / len(samples)


def pass_value(k: int) -> Callable[[Sequence[Sample]], float]:
    """Return a function that computes a question's pass@k."""
    return lambda samples: pass_at_k(len(samples), sum(sample.correct for sample in samples), k)


def compare(runs: Sequence[MethodRun], seed: int = 0, resamples: int = RESAMPLES) -> list[Comparison]:
    """Compare every method with that of the first run.

    Either all runs have the same questions, or each run of a method has those of one run of the baseline (as in a world
    that is generated from the seed). In the first case all runs share one draw of questions; in the second each pair of
    runs has its own.

    Raises:
        ValueError: a run's questions match those of no run of the baseline.
    """
    by_method: dict[str, list[MethodRun]] = defaultdict(list)
    for run in runs:
        by_method[run.method].append(run)
    baseline = by_method[runs[0].method]
    found = []
    for method, own in by_method.items():
        generator = np.random.default_rng(derive_seed(seed, "compare", method))
        found.append(_compare_one(own, baseline, generator, resamples))
    return found


def _compare_one(
    own: Sequence[MethodRun], baseline: Sequence[MethodRun], generator: np.random.Generator, resamples: int
) -> Comparison:
    names = sorted({question.domain for run in own for question in run.questions.values()})
    means = np.array([[_domain_mean(run, name) for name in names] for run in own])  # [runs, domains]
    sizes = np.array([sum(q.domain == name for q in own[0].questions.values()) for name in names])
    shares = sizes / sizes.sum()
    plain = Comparison(
        method=own[0].method,
        num_runs=len(own),
        num_questions=int(sizes.sum()),
        pooled=float((means @ shares).mean()),
        domain_mean=float(means.mean()),
        by_domain={name: float(mean) for name, mean in zip(names, means.mean(axis=0), strict=True)},
    )
    if own[0].method == baseline[0].method:
        return plain
    drawn = _resample(own, baseline, names, generator, resamples)  # [resamples, domains]
    theirs = np.array([[_domain_mean(run, name) for name in names] for run in baseline])
    observed = means.mean(axis=0) - theirs.mean(axis=0)
    return replace(
        plain,
        pooled_difference=_summarise(float(observed @ shares), drawn @ shares),
        domain_mean_difference=_summarise(float(observed.mean()), drawn.mean(axis=1)),
        domain_differences={n: _summarise(float(observed[i]), drawn[:, i]) for i, n in enumerate(names)},
    )


def _domain_mean(run: MethodRun, domain: str) -> float:
    return float(np.mean([question.value for question in run.questions.values() if question.domain == domain]))


def _resample(
    own: Sequence[MethodRun],
    baseline: Sequence[MethodRun],
    names: Sequence[str],
    generator: np.random.Generator,
    resamples: int,
) -> np.ndarray:
    """Resample the differences [resamples, domains], with one draw of questions if all runs share them."""
    if len({frozenset(run.questions) for run in (*own, *baseline)}) == 1:
        task_ids = sorted(baseline[0].questions)
        domains = np.array([baseline[0].questions[task_id].domain for task_id in task_ids])
        ours, theirs = (np.array([_values(run, task_ids) for run in _by_seed(part)]) for part in (own, baseline))
        return bootstrap(ours, theirs, domains, generator, resamples)
    partners = {frozenset(run.questions): run for run in baseline}
    if len(own) != len(baseline) or {frozenset(run.questions) for run in own} != set(partners):
        raise ValueError(f"the runs of {own[0].method} have other questions than those of {baseline[0].method}")
    total = np.zeros((resamples, len(names)))
    weights = _weights(generator, len(own), resamples)
    for number, run in enumerate(_by_seed(own)):
        task_ids = sorted(run.questions)
        domains = np.array([run.questions[task_id].domain for task_id in task_ids])
        ours, theirs = (np.array([_values(r, task_ids)]) for r in (run, partners[frozenset(task_ids)]))
        total += weights[:, [number]] * bootstrap(ours, theirs, domains, generator, resamples)
    return total


def _values(run: MethodRun, task_ids: Sequence[str]) -> list[float]:
    return [run.questions[task_id].value for task_id in task_ids]


def _by_seed(runs: Sequence[MethodRun]) -> list[MethodRun]:
    """Order runs by seed, so that the outer level pairs the same seeds of both methods."""
    return sorted(runs, key=lambda run: (run.seed is None, run.seed or 0))


def bootstrap(
    ours: np.ndarray, theirs: np.ndarray, domains: np.ndarray, generator: np.random.Generator, resamples: int
) -> np.ndarray:
    """Return resampled differences of the means, one column per domain in sorted order: [resamples, domains].

    `ours` and `theirs` are [runs, questions] over the same questions. With the same number of runs on both sides, runs
    are drawn in pairs, otherwise independently.
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
    """Return bootstrap weights [count, size]: how often each of `size` items is drawn, divided by `size`."""
    return generator.multinomial(size, np.full(size, 1 / size), size=count) / size


def _summarise(observed: float, drawn: np.ndarray) -> Difference:
    low, high = np.percentile(drawn, [2.5, 97.5])
    p_value = min(1.0, 2 * min(float((drawn <= 0).mean()), float((drawn >= 0).mean())))
    return Difference(observed, float(low), float(high), max(p_value, 1 / len(drawn)), float(drawn.std()))

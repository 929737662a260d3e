"""Scores of repeated samples, over all questions and by domain, and the scores that guessing would reach.

Every @k value is the exact expectation over k of the n samples of a question, drawn without replacement, then
averaged over questions. Resampling with replacement is biased low (n=16, c=1: .644 where pass@16 is 1).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pmd.types import UNSCORED, CaseCounts, Task, VerdictStatus
from pmd.verifiers.mcq import listed_letters


@dataclass(frozen=True, slots=True)
class Sample:
    """One verified completion. If its verdict is UNSCORED, it is counted and left out of all scores."""

    task_id: str
    domain: str
    correct: bool
    reward: float
    answer: str | None = None  # the extracted answer; None if none was found
    status: VerdictStatus = "ok"
    tests: CaseCounts | None = None  # of verifiers that run tests
    num_words: int = 0  # of the completion
    num_procedural_words: int = 0  # such as strategy, lesson, pattern

    @property
    def is_valid(self) -> bool:
        """Whether the completion contains an answer or a program."""
        return self.answer is not None or (self.tests is not None and self.status != "format")

    @property
    def choice(self) -> tuple[float, bool]:
        """The score by which best-of-n selects, and whether the sample is correct once selected.

        With public tests: the share of them that pass, and whether all other tests pass. Otherwise: reward, correct.
        """
        if self.tests is None or not self.tests.num_public:
            return self.reward, self.correct
        return self.tests.num_public_passed / self.tests.num_public, self.tests.hidden_pass


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a set of samples. The @k mappings hold every k for which each question has enough samples."""

    num_tasks: int
    num_samples: int
    avg: float  # avg@k and avg@1: the mean of the questions' means
    avg_error: float  # standard error, clustered by question; nan for one question
    reward: float  # mean of the questions' mean rewards
    valid_rate: float  # share of samples that contain an answer
    passed_tests: float  # mean of the questions' mean share of passed tests; nan without tests
    pass_at: dict[int, float]
    maj_at: dict[int, float]
    coverage_at: dict[int, float]  # expected number of distinct answers
    headroom_at: dict[int, float]  # pass@k - avg@1
    verifier_headroom_at: dict[int, float]  # pass@k - maj@k, the paper's headroom; empty if no answer was extracted
    best_of: dict[int, float]  # best-of-n: the sample of n that `Sample.choice` ranks first
    pass_at_error: dict[int, float]  # standard errors of pass@k, clustered by question
    num_unscored: int = 0  # samples left out because they could not be verified
    by_domain: dict[str, "Scores"] = field(default_factory=dict)
    domain_avg: float = math.nan  # unweighted mean of the domains' avg; `avg` is pooled over questions
    domain_avg_error: float = math.nan
    procedural_rate: float = math.nan  # procedural words per thousand words; nan without words


def score_samples(samples: Sequence[Sample], ks: Sequence[int] = (1, 8)) -> Scores:
    """Score all samples together and by domain.

    Raises:
        ValueError: no sample could be verified.
    """
    num_samples = len(samples)
    samples = [sample for sample in samples if sample.status not in UNSCORED]
    if not samples:
        raise ValueError(f"score_samples needs at least one scored sample; none of the {num_samples} given is scored")
    by_domain: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_domain[sample.domain].append(sample)
    domains = {domain: _score(part, ks, {}) for domain, part in sorted(by_domain.items())}
    return replace(_score(samples, ks, domains), num_unscored=num_samples - len(samples))


def _score(samples: Sequence[Sample], ks: Sequence[int], by_domain: dict[str, Scores]) -> Scores:
    groups = group_by_task(samples)
    possible = sorted({k for k in ks if k <= min(map(len, groups))})
    means = np.array([np.mean([s.correct for s in group]) for group in groups], dtype=float)
    passed = {k: [pass_at_k(len(g), sum(s.correct for s in g), k) for g in groups] for k in possible}
    pass_at = {k: _mean(values) for k, values in passed.items()}
    shares = [[s.tests.share for s in group if s.tests] for group in groups]
    maj_at = {k: _mean([maj_at_k([(s.answer, s.correct) for s in g], k) for g in groups]) for k in possible}
    has_answers = any(sample.answer is not None for sample in samples)
    avg = _mean(means.tolist())
    return Scores(
        num_tasks=len(groups),
        num_samples=len(samples),
        avg=avg,
        avg_error=clustered_error(means),
        reward=_mean([_mean([s.reward for s in group]) for group in groups]),
        valid_rate=_mean([s.is_valid for s in samples]),
        passed_tests=_mean([_mean(share) for share in shares if share]),
        pass_at=pass_at,
        maj_at=maj_at,
        coverage_at={k: _mean([coverage_at_k([s.answer for s in g], k) for g in groups]) for k in possible},
        headroom_at={k: value - avg for k, value in pass_at.items()},
        verifier_headroom_at={k: value - maj_at[k] for k, value in pass_at.items()} if has_answers else {},
        best_of={k: _mean([_best_of(g, k) for g in groups]) for k in possible},
        pass_at_error={k: clustered_error(np.array(values)) for k, values in passed.items()},
        by_domain=by_domain,
        procedural_rate=_procedural_rate(samples),
        domain_avg=_mean([scores.avg for scores in by_domain.values()]),
        domain_avg_error=math.sqrt(sum(s.avg_error**2 for s in by_domain.values())) / max(1, len(by_domain)),
    )


def group_by_task(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Return the samples of each question, in order of first appearance."""
    questions: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        questions[sample.task_id].append(sample)
    return list(questions.values())


def _best_of(group: Sequence[Sample], n: int) -> float:
    chosen_by, right = zip(*(sample.choice for sample in group), strict=True)
    return best_of_n(chosen_by, right, n)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def clustered_error(question_means: np.ndarray) -> float:
    """Return the standard error of the mean over questions; nan for a single question."""
    count = len(question_means)
    return float(np.std(question_means, ddof=1) / math.sqrt(count)) if count > 1 else math.nan


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the chance that one of k samples is correct: 1 - prod(1 - k/i, i=n-c+1..n) (Chen et al. 2021)."""
    _check_k(num_samples, k)
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_correct + 1, num_samples + 1))


def coverage_at_k(answers: Sequence[str | None], k: int) -> float:
    """Return the expected number of distinct answers among k samples; None does not count as an answer."""
    _check_k(len(answers), k)
    counts = Counter(answer for answer in answers if answer is not None)
    return float(sum(pass_at_k(len(answers), count, k) for count in counts.values()))


def maj_at_k(votes: Sequence[tuple[str | None, bool]], k: int) -> float:
    """Return the chance that the most frequent answer among k samples is correct.

    None casts no vote, tied answers share the win, and no vote at all is wrong. If samples with the same answer differ
    in `correct`, the answer counts with their mean.
    """
    _check_k(len(votes), k)
    counts = Counter(answer for answer, _ in votes if answer is not None)
    num_right = Counter(answer for answer, correct in votes if answer is not None and correct)
    num_null = len(votes) - sum(counts.values())
    total = 0.0
    for answer in num_right:
        others = [count for other, count in counts.items() if other != answer]
        wins = sum(
            math.comb(counts[answer], height) * _ways_below(others, num_null, height, k - height)
            for height in range(1, min(counts[answer], k) + 1)
        )
        total += wins / math.comb(len(votes), k) * num_right[answer] / counts[answer]
    return total


def _ways_below(others: Sequence[int], num_null: int, height: int, drawn: int) -> float:
    """Count the draws in which no other answer exceeds `height` votes; a tie with t others weighs 1 / (t + 1)."""
    ways: dict[tuple[int, int], int] = {
        (used, 0): math.comb(num_null, used) for used in range(min(num_null, drawn) + 1)
    }
    for count in others:
        following: dict[tuple[int, int], int] = defaultdict(int)
        for (used, ties), number in ways.items():
            for cast in range(min(count, height, drawn - used) + 1):
                following[used + cast, ties + (cast == height)] += number * math.comb(count, cast)
        ways = following
    return sum(number / (ties + 1) for (used, ties), number in ways.items() if used == drawn)


def _procedural_rate(samples: Sequence[Sample]) -> float:
    num_words = sum(sample.num_words for sample in samples)
    return 1000 * sum(sample.num_procedural_words for sample in samples) / num_words if num_words else math.nan


def best_of_n(selection_scores: Sequence[float], correct: Sequence[bool], n: int) -> float:
    """Return the chance that the best-scored of n samples is correct; samples tied for best are equally likely.

    With the true verdict as score this is pass@n. With public tests, use them as scores and the rest as `correct`.
    """
    _check_k(len(correct), n)
    levels: dict[float, list[bool]] = defaultdict(list)
    for score, right in zip(selection_scores, correct, strict=True):
        levels[score].append(right)
    total, at_most, draws = 0.0, 0, math.comb(len(correct), n)
    for score in sorted(levels):
        below, at_most = at_most, at_most + len(levels[score])
        chance = (math.comb(at_most, n) - math.comb(below, n)) / draws
        total += chance * sum(levels[score]) / len(levels[score])
    return total


def _check_k(num_samples: int, k: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k} must lie between 1 and the {num_samples} samples of the question")


def chance_scores(tasks: Sequence[Task], ks: Sequence[int]) -> dict[str, Any] | None:
    """Return the scores of uniform guessing, pooled and by domain; None unless all tasks are multiple choice."""
    options: dict[str, list[int]] = defaultdict(list)
    for task in tasks:
        options[task.domain].append(len(listed_letters(task)) if task.verifier == "mcq" else 0)
    counts = [count for part in options.values() for count in part]
    if not counts or min(counts) == 0:
        return None
    by_domain = {domain: _guessing_scores(part, ks) for domain, part in sorted(options.items())}
    return _guessing_scores(counts, ks) | {"by_domain": by_domain}


def _guessing_scores(counts: Sequence[int], ks: Sequence[int]) -> dict[str, Any]:
    """Score guessing with m options per question: k guesses all miss one given option with chance (1 - 1/m)^k."""
    pass_at = {k: sum(1 - (1 - 1 / m) ** k for m in counts) / len(counts) for k in ks}
    coverage_at = {k: sum(m * (1 - (1 - 1 / m) ** k) for m in counts) / len(counts) for k in ks}
    return {"avg": sum(1 / m for m in counts) / len(counts), "pass_at": pass_at, "coverage_at": coverage_at}

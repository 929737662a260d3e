"""Scores of repeated samples, by hand and by enumeration."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmd.evaluation.metrics import Sample, best_of_n, coverage_at_k, maj_at_k, pass_at_k, score_samples

answers = st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=7)


def draws(items, k):
    return list(itertools.combinations(items, k))


def plurality(votes):
    counts = Counter(answer for answer, _ in votes if answer is not None)
    best = [answer for answer, count in counts.items() if count == max(counts.values())]
    return sum(answer == "a" for answer in best) / len(best) if best else 0.0


@given(answers, st.data())
def test_against_enumeration(given_answers, data):
    k = data.draw(st.integers(1, len(given_answers)))
    votes = [(answer, answer == "a") for answer in given_answers]
    drawn = draws(votes, k)
    num_correct = sum(correct for _, correct in votes)
    expected = np.mean([any(correct for _, correct in draw) for draw in drawn])
    assert pass_at_k(len(votes), num_correct, k) == pytest.approx(expected)
    expected = np.mean([len({answer for answer, _ in draw} - {None}) for draw in drawn])
    assert coverage_at_k(given_answers, k) == pytest.approx(expected)
    assert maj_at_k(votes, k) == pytest.approx(np.mean([plurality(draw) for draw in drawn]))


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=7), st.data())
def test_best_of_n_against_enumeration(scored, data):
    n = data.draw(st.integers(1, len(scored)))

    def pick(draw):
        best = max(score for score, _ in draw)
        return np.mean([right for score, right in draw if score == best])

    expected = np.mean([pick(draw) for draw in draws(scored, n)])
    assert best_of_n([s for s, _ in scored], [r for _, r in scored], n) == pytest.approx(expected)
    truth = [right for _, right in scored]
    assert best_of_n([float(t) for t in truth], truth, n) == pytest.approx(pass_at_k(len(truth), sum(truth), n))


def test_pass_at_k_against_the_published_estimator():
    """Chen et al. 2021, as evalplus computes it: 1 - prod(1 - k / arange(n - c + 1, n + 1))."""
    for n, k in itertools.product((1, 4, 16, 100), (1, 2, 8, 64)):
        for c in range(n + 1) if k <= n else ():
            published = 1.0 if n - c < k else 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))
            assert pass_at_k(n, c, k) == pytest.approx(published, abs=1e-12)
            assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)


def test_one_right_in_sixteen_passes_at_sixteen():
    assert pass_at_k(16, 1, 16) == 1.0


def test_k_beyond_the_samples_is_refused():
    for k in (0, 5):
        with pytest.raises(ValueError, match="between 1 and the 4 samples"):
            pass_at_k(4, 1, k)


def make(task_id, domain, pattern):
    """Each character is a sample: its answer, `a` right, `.` none."""
    return [Sample(task_id, domain, c == "a", float(c == "a"), None if c == "." else c) for c in pattern]


def test_scores_by_hand():
    samples = [*make("1", "x", "aab."), *make("2", "x", "bbbb"), *make("3", "y", "aaaa")]
    scores = score_samples(samples, ks=(1, 2, 8))
    assert (scores.num_tasks, scores.num_samples) == (3, 12)
    assert scores.avg == pytest.approx(0.5)
    assert scores.avg_error == pytest.approx(np.std([0.5, 0, 1], ddof=1) / math.sqrt(3))
    assert scores.valid_rate == pytest.approx(11 / 12)
    assert scores.pass_at == pytest.approx({1: 0.5, 2: (5 / 6 + 0 + 1) / 3})
    assert scores.headroom_at[2] == pytest.approx(scores.pass_at[2] - 0.5)
    assert scores.coverage_at[1] == pytest.approx(11 / 12)
    assert scores.domain_avg == pytest.approx((0.25 + 1) / 2)
    assert list(scores.by_domain) == ["x", "y"]
    assert math.isnan(scores.by_domain["y"].avg_error)
    assert scores.by_domain["x"].avg_error == pytest.approx(0.25)


def test_the_papers_headroom_is_pass_at_k_less_maj_at_k():
    """Of four samples two say A, which is right: two drawn agree on it, tie or miss it with chance 1/6, 4/6 and 1/6."""
    samples = [Sample("q", "d", letter == "A", 0.0, letter) for letter in "AABC"]
    scores = score_samples(samples, [1, 2])
    assert scores.maj_at[2] == pytest.approx(1 / 6 + 4 / 6 / 2)
    assert scores.verifier_headroom_at == pytest.approx({1: 0.0, 2: 5 / 6 - 1 / 2})
    programs = [Sample("q", "d", correct, 0.0) for correct in (True, False)]  # no answers to vote on
    assert score_samples(programs, [1, 2]).verifier_headroom_at == {}


def test_questions_have_equal_weight_whatever_their_number_of_samples():
    scores = score_samples([*make("1", "", "a" * 12), *make("2", "", "bb")], ks=(1, 4))
    assert scores.avg == 0.5
    assert set(scores.pass_at) == {1}


def test_large_votes_are_fast_and_sum_to_one():
    pattern = [str(n % 60) for n in range(128)]
    total = sum(maj_at_k([(a, a == str(r)) for a in pattern], 16) for r in range(60))
    assert total == pytest.approx(1.0)


def test_no_samples_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        score_samples([])

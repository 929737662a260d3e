"""Differences paired by seed, against numbers worked by hand."""

import math

import pytest

from pmd.planning.sweep.paired import paired_difference


def test_the_interval_of_three_seeds():
    # Differences .1, .2, .3: mean .2, standard deviation .1, standard error .1 / sqrt(3), t(2, .975) = 4.3027.
    found = paired_difference({0: 0.5, 1: 0.9, 2: 0.7}, {2: 0.4, 0: 0.4, 1: 0.7, 9: 0.0})
    assert found is not None
    assert (found.mean, found.num_seeds) == (pytest.approx(0.2), 3)
    assert found.half_width == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert str(found) == "+20.0 ± 24.8"


def test_a_common_shift_of_the_seeds_costs_no_precision():
    found = paired_difference({0: 0.9, 1: 0.3}, {0: 0.8, 1: 0.2})
    assert found is not None
    assert found.half_width == pytest.approx(0.0, abs=1e-9)


def test_too_few_seeds_give_no_interval():
    assert str(paired_difference({0: 0.5}, {0: 0.7})) == "-20.0"
    assert paired_difference({0: 0.5}, {1: 0.7}) is None

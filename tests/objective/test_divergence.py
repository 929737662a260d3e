"""The divergence against hand-worked numbers; the teacher never gets a gradient."""

import math

import pytest
import torch

from pmd.objective.divergence import per_token_divergence

S, T = [0.5, 0.5], [0.25, 0.75]


def of(alpha, **options):
    student = torch.tensor([[S]], dtype=torch.float64).log()
    teacher = torch.tensor([[T]], dtype=torch.float64).log()
    return per_token_divergence(student, teacher, alpha=alpha, **options).item()


FORWARD = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
REVERSE = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.0, FORWARD), (1.0, REVERSE), ("symmetric", (FORWARD + REVERSE) / 2)]
)
def test_hand_worked(alpha, expected):
    assert of(alpha) == pytest.approx(expected, abs=1e-12)


def test_jensen_shannon_by_hand():
    m = [0.375, 0.625]
    to_s = sum(s * math.log(s / x) for s, x in zip(S, m, strict=True))
    to_t = sum(t * math.log(t / x) for t, x in zip(T, m, strict=True))
    assert of(0.5) == pytest.approx(0.5 * to_s + 0.5 * to_t, abs=1e-12)


def test_top_k_with_tail_of_two_words_is_the_whole():
    assert of(1.0, top_k=1) == pytest.approx(REVERSE, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, "symmetric"])
def test_only_the_student_gets_a_gradient(alpha):
    student = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    per_token_divergence(student, teacher, alpha=alpha, top_k=4).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0

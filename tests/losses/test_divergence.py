"""The divergence against hand-worked numbers; the teacher never gets a gradient."""

import math

import pytest
import torch

from pmd.losses import fused
from pmd.losses.distillation import at_least_float32, per_token_divergence

S, T = [0.5, 0.5], [0.25, 0.75]


def from_logits(student, teacher, **options):
    """The divergence of two policies, given their logits."""
    student, teacher = (at_least_float32(logits).log_softmax(-1) for logits in (student, teacher))
    return per_token_divergence(student, teacher, **options)


def of(alpha, **options):
    student = torch.tensor([[S]], dtype=torch.float64).log()
    teacher = torch.tensor([[T]], dtype=torch.float64).log()
    return from_logits(student, teacher, alpha=alpha, **options).item()


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
    from_logits(student, teacher, alpha=alpha, top_k=4).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def plain(student, teacher, alpha):
    """Textbook KLs of two probability vectors, in Python floats."""

    def kl(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    if alpha == "symmetric":
        return (kl(teacher, student) + kl(student, teacher)) / 2
    if alpha == 0.0:
        return kl(teacher, student)
    if alpha == 1.0:
        return kl(student, teacher)
    mixture = [(1 - alpha) * s + alpha * t for s, t in zip(student, teacher, strict=True)]
    return (1 - alpha) * kl(student, mixture) + alpha * kl(teacher, mixture)


ALPHAS = [0.0, 0.3, 0.5, 1.0, "symmetric"]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("top_k", [None, 1, 3, 6])
def test_against_textbook_loops(alpha, top_k):
    torch.manual_seed(3)
    student, teacher = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    found = from_logits(student, teacher, alpha=alpha, top_k=top_k)
    for b in range(2):
        for t in range(3):
            s, p = student[b, t].softmax(-1), teacher[b, t].softmax(-1)
            if top_k is not None:
                ids = s.topk(top_k).indices
                s, p = (torch.cat([x[ids], 1 - x[ids].sum(0, keepdim=True)]) for x in (s, p))
            assert found[b, t].item() == pytest.approx(plain(s.tolist(), p.tolist(), alpha), rel=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 3, "tail": False}])
def test_gradients_numerically(alpha, options):
    torch.manual_seed(4)
    student, teacher = torch.randn(2, 1, 2, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: from_logits(s, teacher, alpha=alpha, **options), student.requires_grad_())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_float32_and_bfloat16_stay_near_the_reference(alpha):
    torch.manual_seed(5)
    student, teacher = 5 * torch.randn(2, 2, 3, 500, dtype=torch.float64)
    exact = from_logits(student, teacher, alpha=alpha)
    single = from_logits(student.float(), teacher.float(), alpha=alpha)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-6)
    half = from_logits(student.bfloat16(), teacher.bfloat16(), alpha=alpha)
    rounded = from_logits(student.bfloat16().double(), teacher.bfloat16().double(), alpha=alpha)
    torch.testing.assert_close(half.double(), rounded, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_policies_have_no_divergence(alpha):
    logits = torch.randn(1, 4, 9, dtype=torch.float64)
    assert from_logits(logits, logits.clone(), alpha=alpha, top_k=4).abs().max() < 1e-12


def test_the_support_is_the_students_not_the_teachers():
    student = torch.tensor([[[5.0, 4.0, 0.0, 0.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[0.0, 0.0, 5.0, 4.0]]], dtype=torch.float64)
    inside = torch.stack([x.softmax(-1)[0, 0, :2] for x in (student, teacher)])
    s, t = (torch.cat([row, 1 - row.sum(0, keepdim=True)]) for row in inside)
    expected = (s * (s / t).log()).sum().item()
    assert from_logits(student, teacher, alpha=1.0, top_k=2).item() == pytest.approx(expected)


def test_impossible_tokens():
    """A teacher that forbids what the student does not do costs nothing; what it does do costs infinitely much."""
    student = torch.tensor([[[0.0, 0.0, -math.inf]]], dtype=torch.float64, requires_grad=True)
    same = torch.tensor([[[0.0, 0.0, -math.inf]]], dtype=torch.float64)
    value = from_logits(student, same, alpha=1.0)
    value.sum().backward()
    assert value.item() == 0.0
    assert torch.isfinite(student.grad[..., :2]).all()
    forbids = torch.tensor([[[0.0, -math.inf, 0.0]]], dtype=torch.float64)
    assert from_logits(student, forbids, alpha=1.0).item() == math.inf


def test_a_token_that_only_the_teacher_allows_counts_in_the_mixture():
    """S = (1/2, 1/2, 0), T = (1/4, 1/4, 1/2), M = (3/8, 3/8, 1/4)."""
    student = torch.tensor([[[0.0, 0.0, -math.inf]]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[[0.25, 0.25, 0.5]]], dtype=torch.float64).log()
    value = from_logits(student, teacher, alpha=0.5)
    expected = 0.5 * math.log(0.5 / 0.375) + 0.5 * (0.5 * math.log(0.25 / 0.375) + 0.5 * math.log(0.5 / 0.25))
    assert value.item() == pytest.approx(expected)
    value.sum().backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_token_that_both_forbid_gives_no_nan(alpha):
    student = torch.tensor([[[0.3, 0.0, -math.inf]]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[[0.0, 0.5, -math.inf]]], dtype=torch.float64)
    value = from_logits(student, teacher, alpha=alpha)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("alpha", "top_k", "message"),
    [
        (1.5, None, "alpha=1.5 must lie in"),
        (-0.1, None, "alpha=-0.1 must lie in"),
        (0.5, 0, "top_k=0 must be at least 1"),
    ],
)
def test_values_without_meaning_are_refused(alpha, top_k, message):
    logits = torch.zeros(1, 1, 3)
    with pytest.raises(ValueError, match=message):
        from_logits(logits, logits, alpha=alpha, top_k=top_k)


def test_an_unknown_word_is_refused():
    with pytest.raises((ValueError, TypeError)):  # the latter where types are checked, as in this suite
        from_logits(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), alpha="forward")


def test_an_impossible_token_has_no_entropy():
    logprobs = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]], dtype=torch.float64).log()
    expected = [math.log(2), 1.5 * math.log(2)]
    assert fused.entropy(logprobs, logprobs.exp()).tolist() == pytest.approx(expected)

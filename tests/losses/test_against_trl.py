"""The divergence, the clip and the tail against TRL's own SDPO loss, on the same float64 tensors."""

import pytest
import torch

from pmd.losses.distillation import per_token_divergence, policy_ratio

ALPHAS = [0.0, 0.2, 0.5, 0.9, 1.0]


@pytest.fixture(scope="module")
def trl_loss():
    """TRL's functions, imported only where these tests run: it takes seconds."""
    return pytest.importorskip("trl.experimental.sdpo.loss_utils")


def logits(seed: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, 3, 5, 40, generator=generator, dtype=torch.float64) * scale
    return draw[0].requires_grad_(), draw[1]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("seed", range(5))
def test_whole_vocabulary(trl_loss, alpha, seed):
    student, teacher = logits(seed)
    ours = per_token_divergence(student.log_softmax(-1), teacher.log_softmax(-1), alpha=alpha)
    theirs = trl_loss.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    (our_gradient,) = torch.autograd.grad(ours.sum(), student)
    (their_gradient,) = torch.autograd.grad(theirs.sum(), student)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("top_k", [1, 4, 39])
def test_the_students_top_k(trl_loss, alpha, tail, top_k):
    student, teacher = logits(7, scale=1.0)
    ours = per_token_divergence(student.log_softmax(-1), teacher.log_softmax(-1), alpha=alpha, top_k=top_k, tail=tail)
    theirs = trl_loss.compute_topk_self_distillation_loss(
        student, teacher, distillation_topk=top_k, distillation_alpha=alpha, distillation_add_tail=tail
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    if top_k > 1 or tail:
        (our_gradient,) = torch.autograd.grad(ours.sum(), student)
        (their_gradient,) = torch.autograd.grad(theirs.sum(), student)
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-8, atol=1e-10)


def test_where_float32_cannot_see_the_tail_ours_is_the_exact_one(trl_loss):
    """A tail of 1e-9: the peer clamps it to 1e-7, the float64 reference and ours do not."""
    student = torch.zeros(1, 1, 5)
    student[..., 0] = 22.0
    teacher = torch.zeros(1, 1, 5)
    exact = per_token_divergence(student.double().log_softmax(-1), teacher.double().log_softmax(-1), alpha=0.0, top_k=1)
    ours = per_token_divergence(student.log_softmax(-1), teacher.log_softmax(-1), alpha=0.0, top_k=1)
    theirs = trl_loss.compute_topk_self_distillation_loss(
        student, teacher, distillation_topk=1, distillation_alpha=0.0, distillation_add_tail=True
    )
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=0)
    assert abs(theirs.double() - exact) > 10 * abs(ours.double() - exact)


def test_the_importance_clip(trl_loss):
    student = torch.tensor([-1.0, -2.0, -0.1, -30.0], dtype=torch.float64)
    old = torch.tensor([-1.5, -1.0, -9.0, -1.0], dtype=torch.float64)
    theirs = trl_loss.apply_importance_sampling_clipping(torch.ones(4, dtype=torch.float64), student, old, 2.0)
    torch.testing.assert_close(policy_ratio(student, old, 2.0), theirs, rtol=1e-6, atol=3e-9)

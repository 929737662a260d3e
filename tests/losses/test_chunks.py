"""Chunked scoring: the same numbers as whole logits, with a faint tail too, and no tensor larger than one chunk."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pmd.losses.distillation import TeacherPart, per_token_divergence
from pmd.scoring import IMPLEMENTATIONS

NUM_TOKENS, HIDDEN, VOCABULARY = 11, 6, 50


def tensors(scale: float = 1.0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(NUM_TOKENS, HIDDEN, generator=generator, dtype=torch.float64) * scale
    teacher = student + torch.randn(NUM_TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator)
    return student.to(dtype), teacher.to(dtype), head.to(dtype), targets


@pytest.mark.parametrize("token_terms", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_a_tail_that_underflows_is_still_exact(token_terms):
    student, teacher, head, targets = tensors(scale=400.0)
    expected = per_token_divergence(
        (student @ head.T).log_softmax(-1), (teacher @ head.T).log_softmax(-1), alpha=0.0, top_k=3
    )
    mass = (student @ head.T).log_softmax(-1).sort(-1, descending=True).values[:, 3:].logsumexp(-1)
    assert mass.min() < -104, "no tail is beyond float32"
    hidden = student.float().requires_grad_()
    part = TeacherPart(teacher.float(), head.float(), 1.0)
    terms = token_terms(hidden, head.float(), targets, [part], alpha=0.0, top_k=3, chunk_tokens=4)
    assert terms.per_token_divergence is not None
    terms.per_token_divergence.sum().backward()
    torch.testing.assert_close(terms.per_token_divergence.double(), expected, rtol=1e-3, atol=1e-2)
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("token_terms", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_nothing_larger_than_a_chunk_of_logits_exists(token_terms, trains_head):
    student, teacher, head, targets = tensors()
    student, teacher, targets = student.repeat(20, 1), teacher.repeat(20, 1), targets.repeat(20)
    head.requires_grad_(trains_head)
    with LargestTensor() as largest:
        part = TeacherPart(teacher, head, 1.0)
        terms = token_terms(student.requires_grad_(), head, targets, [part], alpha=0.5, top_k=5, chunk_tokens=30)
        assert terms.per_token_divergence is not None
        terms.per_token_divergence.sum().backward()
    assert largest.elements == max(30 * VOCABULARY, student.numel())

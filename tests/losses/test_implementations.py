"""`fused` gives the numbers of the readable implementation, whatever is compared; neither holds more than a chunk."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pmd.losses import distillation, fused
from pmd.losses.distillation import TeacherPart, TokenTerms

#: Of terms and of gradients, relative to a tensor's largest value. Gradients of a bfloat16 head are rounded to 8 bits,
#: in one implementation before they are scaled by the loss and in the other after it.
TOLERANCES = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-3, 1e-2)}


def compute(
    token_terms: Any, tensors: dict[str, Any], trains_head: bool, **options: Any
) -> tuple[TokenTerms, list[Tensor]]:
    """Return the terms, and the gradients of a loss that uses every term that has one."""
    hidden = tensors["hidden"].clone().requires_grad_()
    head = tensors["head"].clone().requires_grad_(trains_head)
    terms = token_terms(hidden, head, tensors["targets"], tensors["teacher"], **options)
    loss = (terms.student_logprobs * tensors["mix"][0]).sum()
    if terms.per_token_divergence is not None:
        loss = loss + (terms.per_token_divergence * tensors["mix"][1]).sum()
    return terms, list(torch.autograd.grad(loss, [hidden, head] if trains_head else [hidden]))


def draw_tensors(
    seed: int, shape: tuple[int, int, int], parts: int, scale: float, dtype: torch.dtype
) -> dict[str, Any]:
    """Return random inputs; a teacher may have another width than the student. Scale makes tails small."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, hidden, vocabulary = shape
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    weights = [0.3, 0.7] if parts == 2 else [1.0]
    teacher = [
        TeacherPart((randn(num_tokens, hidden + n) * scale).to(dtype), randn(vocabulary, hidden + n).to(dtype), weight)
        for n, weight in zip(range(parts), weights, strict=False)
    ]
    return {
        "hidden": (randn(num_tokens, hidden) * scale).to(dtype),
        "head": randn(vocabulary, hidden).to(dtype),
        "targets": torch.randint(vocabulary, (num_tokens,), generator=generator),
        "teacher": teacher,
        "mix": randn(2, num_tokens).to(torch.float64 if dtype == torch.float64 else torch.float32),
    }


def assert_equal(
    one: tuple[TokenTerms, list[Tensor]], other: tuple[TokenTerms, list[Tensor]], tolerances: tuple[float, float]
) -> None:
    for name in ("student_logprobs", "entropy", "per_token_divergence", "teacher_logprobs"):
        values, expected = getattr(one[0], name), getattr(other[0], name)
        assert (values is None) == (expected is None)
        if values is not None:
            close(values.detach(), expected.detach(), tolerances[0], name)
    for number, (found, expected) in enumerate(zip(one[1], other[1], strict=True)):
        close(found, expected, tolerances[1], f"gradient {number}")


def close(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    assert found.dtype == expected.dtype
    assert expected.isfinite().all()
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{name}: {m}")


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(2, 23)),
    parts=st.integers(0, 2),
    alpha=st.sampled_from([0.0, 0.25, 0.5, 1.0, "symmetric"]),
    top_k=st.one_of(st.none(), st.integers(1, 25)),
    tail=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7]),
    chunk_tokens=st.integers(1, 12),
    trains_head=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 6.0]),
    dtype=st.sampled_from(list(TOLERANCES)),
)
@example(0, (9, 3, 23), 2, 0.5, 4, True, 0.7, 4, True, 1.0, torch.float64)
@example(0, (9, 3, 23), 1, "symmetric", 4, False, 0.7, 4, False, 1.0, torch.float64)
@example(1, (7, 5, 20), 1, 0.0, 3, True, 1.0, 2, True, 6.0, torch.bfloat16)
@example(1, (7, 5, 20), 0, 1.0, None, True, 0.7, 3, True, 1.0, torch.float32)
def test_both_give_the_same_numbers(
    seed, shape, parts, alpha, top_k, tail, temperature, chunk_tokens, trains_head, scale, dtype
):
    tensors = draw_tensors(seed, shape, parts, scale, dtype)
    options = {"alpha": alpha, "top_k": top_k, "tail": tail, "temperature": temperature, "chunk_tokens": chunk_tokens}
    one, other = (compute(module.token_terms, tensors, trains_head, **options) for module in (fused, distillation))
    assert_equal(one, other, TOLERANCES[dtype])


def test_both_take_hidden_states_that_are_finer_than_the_head():
    """As with adapters in float32 on a base in bfloat16: the product is computed in the head's dtype."""
    tensors = draw_tensors(2, (6, 5, 30), 1, 1.0, torch.bfloat16)
    fine = tensors | {"hidden": tensors["hidden"].float()}
    one, other = (compute(module.token_terms, fine, False, alpha=0.5) for module in (fused, distillation))
    assert_equal(one, other, TOLERANCES[torch.bfloat16])
    terms, _ = compute(distillation.token_terms, tensors, False, alpha=0.5)
    torch.testing.assert_close(one[0].student_logprobs, terms.student_logprobs)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, "symmetric"])
@pytest.mark.parametrize("top_k", [None, 2, 6])
@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 100])
def test_both_give_the_same_numbers_with_a_tail_beyond_float32(alpha, top_k, trains_head, chunk_tokens):
    """The last of ten tokens are 150 nats less likely than the first: their probabilities are 0 in float32."""
    hidden = torch.tensor([[1.0, 0.2], [0.9, -0.1]], dtype=torch.float64)
    head = torch.stack(
        [torch.cat([torch.zeros(4), -torch.linspace(140, 150, 6)]), torch.linspace(-1, 1, 10)], 1
    ).double()
    for dtype in (torch.float64, torch.float32):
        tensors = {
            "hidden": hidden.to(dtype),
            "head": head.to(dtype),
            "targets": torch.tensor([0, 3]),
            "teacher": [TeacherPart(hidden.flip(0).to(dtype) * 1.1, head.to(dtype))],
            "mix": torch.ones(2, 2, dtype=dtype),
        }
        options = {"alpha": alpha, "top_k": top_k, "chunk_tokens": chunk_tokens}
        one, other = (compute(module.token_terms, tensors, trains_head, **options) for module in (fused, distillation))
        assert_equal(one, other, TOLERANCES[dtype])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, "symmetric"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_both_give_the_same_numbers_where_student_and_teacher_forbid_a_token(alpha, top_k):
    """A row of -inf in the head forbids a token to both: neither term may become NaN.

    The entropy is not compared: in `fused` it is a plain dot product, which has no 0 log 0. A finite head has no -inf.
    """
    found = []
    for module in (fused, distillation):
        hidden = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64, requires_grad=True)
        head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.4], [-torch.inf, -torch.inf]], dtype=torch.float64)
        teacher = [TeacherPart(torch.tensor([[0.5, 1.0], [1.0, 1.0]], dtype=torch.float64), head)]
        terms = module.token_terms(hidden, head, torch.tensor([0, 2]), teacher, alpha=alpha, top_k=top_k)
        assert terms.per_token_divergence is not None
        assert terms.per_token_divergence.isfinite().all()
        assert terms.student_logprobs.isfinite().all()
        found.append(terms)
    for name in ("student_logprobs", "per_token_divergence", "teacher_logprobs"):
        one, other = (getattr(terms, name).detach() for terms in found)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("module", [fused, distillation], ids=["fused", "reference"])
def test_a_tail_that_underflows_in_float32_is_still_exact(module):
    tensors = draw_tensors(0, (11, 6, 50), 1, 400.0, torch.float64)
    hidden, head, (teacher,) = tensors["hidden"], tensors["head"], tensors["teacher"]
    student, other = (
        (states @ weight.T).log_softmax(-1) for states, weight in ((hidden, head), (teacher.hidden, head))
    )
    expected = distillation.per_token_divergence(student, other, alpha=0.0, top_k=3)
    assert student.sort(-1, descending=True).values[:, 3:].logsumexp(-1).min() < -104, "no tail is beyond float32"
    hidden = hidden.float().requires_grad_()
    part = TeacherPart(teacher.hidden.float(), head.float())
    terms = module.token_terms(hidden, head.float(), tensors["targets"], [part], alpha=0.0, top_k=3, chunk_tokens=4)
    assert terms.per_token_divergence is not None
    terms.per_token_divergence.sum().backward()
    torch.testing.assert_close(terms.per_token_divergence.double(), expected, rtol=1e-3, atol=1e-2)
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("parts", [0, 2])
@pytest.mark.parametrize("module", [fused, distillation], ids=["fused", "reference"])
def test_nothing_larger_than_a_chunk_of_logits_exists(module, parts, top_k, trains_head):
    num_tokens, hidden, vocabulary, chunk = 130, 6, 50, 30
    tensors = draw_tensors(0, (num_tokens, hidden, vocabulary), parts, 1.0, torch.float64)
    with LargestTensor() as largest:
        compute(module.token_terms, tensors, trains_head, alpha=0.5, top_k=top_k, chunk_tokens=chunk)
    assert chunk * vocabulary <= largest.elements <= max(chunk * vocabulary, num_tokens * (hidden + 1))

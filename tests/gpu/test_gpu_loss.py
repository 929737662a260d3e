"""The compiled kernels on a GPU against the reference implementation in float64, with tiles of their real size."""

import functools

import pytest
import torch

from pmd.losses import distillation, fused
from pmd.losses.distillation import TeacherPart

pytestmark = pytest.mark.gpu
#: Tokens, width, vocabulary: several chunks, tiles and slabs, none of which divides the next. The second vocabulary's
#: rows start at odd addresses.
SHAPES = [(70, 64, 40_000), (33, 48, 33_331)]


def draw(shape: tuple[int, int, int], dtype: torch.dtype, spread: float, parts: int) -> dict:
    num_tokens, hidden, vocabulary = shape
    generator = torch.Generator("cuda").manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator, device="cuda", dtype=torch.float64)
    student, head = spread * randn(num_tokens, hidden), randn(vocabulary, hidden) / hidden**0.5
    weights = {0: [], 1: [1.0], 2: [0.3, 0.7]}[parts]
    return {
        "hidden": student.to(dtype),
        "head": head.to(dtype),
        "targets": torch.randint(vocabulary, (num_tokens,), generator=generator, device="cuda"),
        "teacher": [TeacherPart((student + randn(num_tokens, hidden)).to(dtype), head.to(dtype), w) for w in weights],
        "mix": randn(2, num_tokens),
    }


def compute(score, inputs: dict, dtype: torch.dtype, trains_head: bool, **options) -> dict[str, torch.Tensor]:
    hidden, head = (inputs[name].to(dtype).requires_grad_() for name in ("hidden", "head"))
    head.requires_grad_(trains_head)
    teacher = [TeacherPart(p.hidden.to(dtype), p.head.to(dtype), p.weight) for p in inputs["teacher"]]
    terms = score(hidden, head, inputs["targets"], teacher, **options)
    loss = (terms.student_logprobs * inputs["mix"][0]).sum()
    found = {"logprobs": terms.student_logprobs, "entropy": terms.entropy}
    if terms.per_token_divergence is not None:
        loss = loss + (terms.per_token_divergence * inputs["mix"][1]).sum()
        found |= {"divergence": terms.per_token_divergence, "teacher": terms.teacher_logprobs}
    gradients = torch.autograd.grad(loss, [hidden, head] if trains_head else [hidden])
    return found | {f"gradient {number}": gradient for number, gradient in enumerate(gradients)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize(
    ("parts", "alpha", "top_k", "tail", "temperature"),
    [
        (1, 0.5, 100, True, 1.0),
        (1, 0.0, 20, True, 0.7),
        (2, 1.0, 100, False, 1.0),
        (2, "symmetric", 1, True, 1.0),
        (1, 0.5, 3000, True, 1.0),  # more than the kernel selects
        (0, 1.0, None, True, 0.7),
    ],
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-3)])
def test_terms_and_gradients_are_those_of_float64(
    shape, trains_head, parts, alpha, top_k, tail, temperature, dtype, bound
):
    """Relative to the norm. In bfloat16 a gradient is rounded to 8 bits three times, terms are not rounded at all."""
    assert fused.has_kernels()
    inputs = draw(shape, dtype, 3.0, parts)
    options = {"alpha": alpha, "top_k": top_k, "tail": tail, "temperature": temperature, "chunk_tokens": 32}
    found = compute(fused.token_terms, inputs, dtype, trains_head, **options)
    exact = compute(distillation.token_terms, inputs, torch.float64, trains_head, **options)
    for name, value in found.items():
        allowed = bound if name.startswith("gradient") else 1e-4
        assert (value.double() - exact[name]).norm() <= allowed * exact[name].norm(), name


def test_the_compiled_search_for_the_top_k_is_exact():
    from pmd.losses.triton_kernels import Launch, select

    generator = torch.Generator("cuda").manual_seed(1)
    plain = torch.randn(50_001, generator=generator, device="cuda")
    crowded = plain.clone()
    crowded[::4096] += 50.0  # all of the largest in one lane
    steps = (4 * plain).round()
    logits = torch.stack([plain, crowded, steps, torch.zeros_like(plain), plain.bfloat16().float(), -plain.abs()])
    logits = torch.cat([logits, torch.where(plain > 3.3, plain, -torch.inf)[None]])
    targets = torch.arange(len(logits), device="cuda")
    for k in (1, 100, 500):
        for launch in (
            Launch(),
            Launch(select_stages=3),
            Launch(lanes=2048, warps=4, select_lanes=4096, select_warps=16),
        ):
            rows = select(logits.clone(), targets, k, 1.0, launch)
            ids = rows.ids[:, :k].long()
            assert all(row.unique().numel() == k for row in ids)
            expected = logits.topk(k, dim=-1).values
            assert torch.equal(logits.gather(1, ids).sort(-1, descending=True).values, expected)
            assert torch.equal(rows.picked[:, k], logits.gather(1, targets[:, None])[:, 0])
            others = logits.double().scatter(1, ids, -torch.inf).logsumexp(-1)
            torch.testing.assert_close(rows.maximum.double() + rows.total.double().log(), others, rtol=1e-5, atol=1e-5)
            again = select(logits.clone(), targets, k, 1.0, launch)
            assert torch.equal(rows.ids, again.ids)
            assert torch.equal(rows.total, again.total)


def test_memory_stays_below_a_chunk_and_a_slab():
    """Of 1,000 tokens x 152,064 logits, in chunks of 256."""
    inputs = draw((1000, 64, 152_064), torch.bfloat16, 1.0, 1)
    inputs["mix"] = inputs["mix"].float()
    compute(fused.token_terms, inputs, torch.bfloat16, False, alpha=0.5, top_k=100, chunk_tokens=256)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compute(fused.token_terms, inputs, torch.bfloat16, False, alpha=0.5, top_k=100, chunk_tokens=256)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 1.15 * 4 * 256 * (152_064 + 16_384)

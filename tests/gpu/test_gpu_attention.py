"""Packed rows on a GPU: torch's flash attention against the plain implementation, and every way of one step."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from examples import tiny_module
from test_attention import HEADS, implied_mask, one_softmax, packed_rows
from test_training_step import METHODS

from pmd import attention_kernels
from pmd.attention import PackedLayout, attend_packed
from pmd.attention_kernels import HOPPER, LONG_SEGMENT, Segments
from pmd.batch import Batch
from pmd.packing import moved
from pmd.planning.synthetic import Lengths, synthetic_examples

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("window", [None, 6, 30, 500])
@pytest.mark.parametrize("gather", [False, True])
def test_flash_attention_of_packed_rows_equals_one_softmax(shares, window, gather):
    packed = packed_rows(shares=shares)
    torch.manual_seed(0)
    wide = [torch.randn(len(packed.input_ids), heads, 64, dtype=torch.float64) for heads in (HEADS, 2, 2)]
    wide = [part.bfloat16().double().requires_grad_() for part in wide]
    direction = torch.randn(len(packed.input_ids), HEADS, 64, dtype=torch.float64)
    expected = one_softmax(*wide, implied_mask(packed, window), 0.125)
    gradients = torch.autograd.grad((expected * direction).sum(), wide)
    parts = [part.detach().to(CUDA, torch.bfloat16).requires_grad_() for part in wide]
    layout = moved(packed, CUDA).layout
    computed = attend_packed(*parts, layout, scale=0.125, window=window, gather=gather)
    found = torch.autograd.grad((computed * direction.to(CUDA, torch.bfloat16)).sum(), parts)
    for one, other in zip((computed, *found), (expected, *gradients), strict=True):
        error = (one.cpu().double() - other).abs().max() / other.abs().max()
        assert error < 0.02, f"relative error {error:.3f} in bfloat16"


def test_padded_packed_shared_and_recomputed_give_one_gradient():
    """Tiny model in bfloat16: the ways differ by rounding alone, which the largest allowed difference bounds."""
    examples = synthetic_examples(2, 4, Lengths(48, 80, 4, 24), 100)
    gradients = {}
    for attention, mode in (("sdpa", False), ("varlen", False), ("varlen", "selective"), ("varlen", True)):
        module = tiny_module(
            METHODS["pmd"], finetune="lora", dtype="bfloat16", attention=attention, gradient_checkpointing=mode
        ).to(CUDA)
        for shared in (module.layout.shared, frozenset()):
            module.layout = replace(module.layout, shared=shared)
            module.zero_grad()
            for micro_batch in Batch(tuple(examples), 0, 0).micro_batches(module.layout, CUDA):
                terms = module._score(micro_batch)
                (terms.per_token_divergence * micro_batch.tokens.token_weights).sum().backward()
            trained = [p.grad.flatten().float() for p in module.parameters() if p.grad is not None]
            gradients[attention, mode, bool(shared)] = torch.cat(trained)
    expected = gradients["sdpa", False, False]
    for way, gradient in gradients.items():
        assert torch.nn.functional.cosine_similarity(gradient, expected, 0) > 0.995, way


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < HOPPER, reason="not a Hopper GPU"
)
def test_long_segments_by_cudnn_equal_flash_attention(monkeypatch):
    """Long and short segments mixed, some of a length that is rounded up."""
    lengths = (300, LONG_SEGMENT + 100, 20, 40, 2 * LONG_SEGMENT, LONG_SEGMENT)
    own = Segments(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=CUDA), lengths)
    torch.manual_seed(0)
    parts = [
        torch.randn(sum(lengths), heads, 128, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2)
    ]
    direction = torch.randn_like(parts[0])
    found = []
    for long in (LONG_SEGMENT, 1 << 30):
        monkeypatch.setattr(attention_kernels, "LONG_SEGMENT", long)
        out = attend_packed(*parts, PackedLayout(own, max(lengths)), scale=0.1)
        found.append([out, *torch.autograd.grad((out * direction).sum(), parts)])
    assert attention_kernels._serves(parts[0].device, torch.bfloat16, 8, 2, 128)
    for by_cudnn, by_flash in zip(*found, strict=True):
        assert not torch.equal(by_cudnn, by_flash)  # two kernels, two orders of sums
        assert (by_cudnn - by_flash).norm() < 0.01 * by_flash.norm()

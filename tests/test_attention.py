"""Attention over packed rows: the same output and gradient as one softmax with the mask that the rows imply."""

import random
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from examples import random_ids
from torch._subclasses.fake_tensor import FakeTensorMode

from pmd import attention_kernels
from pmd.attention import attend_packed
from pmd.attention_kernels import LONG_SEGMENT, Call, Segments
from pmd.batch import pack_rows
from pmd.packing import PackedSequences

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def packed_rows(*, shares: bool) -> PackedSequences:
    """Two groups that share 20 and 33 tokens, one that shares too little, and a row alone; groups mixed."""
    draw = random.Random(0)
    beginnings = [random_ids(draw, length) for length in (21, 5, 34, 12)]
    rows = [(0, 3, 9), (2, 0, 4), (1, 2, 3), (0, 0, 30), (2, 4, 1), (3, 0, 6), (1, 0, 2), (2, 1, 17)]
    pairs = [(beginnings[group] + random_ids(draw, own), random_ids(draw, length)) for group, own, length in rows]
    return pack_rows(pairs, [group for group, _, _ in rows], shares)


def implied_mask(packed: PackedSequences, window: int | None) -> torch.Tensor:
    """Who sees whom, [T, T], from positions and from the prefix that each segment continues."""
    own, shared = packed.layout.own.slices(), packed.layout.shared
    sees = torch.zeros(len(packed.input_ids), len(packed.input_ids), dtype=torch.bool)
    for segment in own:
        sees[segment, segment] = True
    if shared is not None:
        start = sum(packed.layout.own.lengths) - shared.num_row_tokens
        for rows, prefix in zip(shared.queries.slices(), shared.prefixes.slices(), strict=True):
            behind, before = start - shared.num_prefix_tokens, start
            sees[before + rows.start : before + rows.stop, behind + prefix.start : behind + prefix.stop] = True
    distance = packed.position_ids[:, None] - packed.position_ids
    return sees & (distance >= 0) & (distance < (window or 1000))


def one_softmax(query, key, value, mask, scale):
    key, value = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("window", [None, 6, 30, 500])
@pytest.mark.parametrize("gather", [False, True])
def test_output_and_gradient_are_those_of_one_softmax(shares, window, gather):
    packed = packed_rows(shares=shares)
    assert (packed.layout.shared is not None) == shares
    torch.manual_seed(0)
    parts = [
        torch.randn(len(packed.input_ids), heads, WIDTH, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    direction = torch.randn(len(packed.input_ids), HEADS, WIDTH, dtype=torch.float64)
    computed = attend_packed(*parts, packed.layout, scale=0.7, window=window, gather=gather)
    expected = one_softmax(*parts, implied_mask(packed, window), 0.7)
    torch.testing.assert_close(computed, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad((out * direction).sum(), parts) for out in (computed, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_the_calls_on_cuda_fit_torchs_operators():
    """Without a GPU: tensors without data run through the operators' own checks of arguments and shapes."""
    packed = packed_rows(shares=True)
    with FakeTensorMode():

        def on_cuda(segments: Segments) -> Segments:
            return replace(segments, bounds=torch.empty(len(segments.lengths) + 1, dtype=torch.int32, device="cuda"))

        own, keys = on_cuda(packed.layout.own), on_cuda(packed.layout.shared.keys)
        query = torch.empty(sum(own.lengths), HEADS, 64, dtype=torch.bfloat16, device="cuda")
        key = torch.empty(sum(keys.lengths), KV_HEADS, 64, dtype=torch.bfloat16, device="cuda")
        for call in (Call(own, keys, 0.1), Call(own, keys, 0.1, causal=False), Call(own, keys, 0.1, window=7)):
            out, lse = attention_kernels.forward(query, key, key, call)
            gradients = attention_kernels.backward(out, query, key, key, out, lse, call)
            assert out.device.type == "cuda"
            assert (out.shape, lse.shape) == (query.shape, (HEADS, len(query)))
            assert [grad.shape for grad in gradients] == [query.shape, key.shape, key.shape]


def cudnn_forward(query, key, value, bias, computes_lse, dropout, causal, debug, *, scale):
    """What cuDNN's operator returns, computed plainly: for one row [1, heads, T, D] that attends to itself."""
    assert (bias, computes_lse, dropout, causal, debug) == (None, True, 0.0, True, False)
    out, lse = attention_kernels._plain_forward(
        *(p[0].transpose(0, 1) for p in (query, key, value)), whole(query, scale)
    )
    return out.transpose(0, 1)[None], lse[None, :, :, None], None, None, query.shape[2], key.shape[2], None, None, None


def cudnn_backward(grad, query, key, value, out, lse, seed, offset, bias, *sizes, scale):
    assert sizes == (None, None, query.shape[2], key.shape[2], 0.0, True)
    assert lse.is_contiguous()
    parts = (p[0].transpose(0, 1) for p in (grad, query, key, value, out))
    gradients = attention_kernels._plain_backward(*parts, lse[0, :, :, 0], whole(query, scale))
    return [gradient.transpose(0, 1)[None] for gradient in gradients]


def whole(query: torch.Tensor, scale: float) -> Call:
    tokens = query.shape[2]
    assert tokens % attention_kernels.LENGTH_STEP == 0
    row = Segments(torch.tensor([0, tokens], dtype=torch.int32), (tokens,))
    return Call(row, row, scale)


@pytest.mark.parametrize("lengths", [(13,), (12, 5), (3, 4, 16, 17, 2, 30), (1, 2, 11), (12, 12, 9, 3)])
def test_long_segments_alone_equal_all_together(lengths, monkeypatch):
    """Rounded up with zeros behind them, next to runs of short ones; CUDA's operators are replaced by plain ones."""
    monkeypatch.setattr(attention_kernels, "LONG_SEGMENT", 11)
    monkeypatch.setattr(attention_kernels, "LENGTH_STEP", 4)
    monkeypatch.setattr(attention_kernels, "_flash_forward", attention_kernels._plain_forward)
    monkeypatch.setattr(attention_kernels, "_flash_backward", attention_kernels._plain_backward)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", cudnn_forward)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", cudnn_backward)
    own = Segments(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), lengths)
    call, tokens = Call(own, own, 0.7), sum(lengths)
    torch.manual_seed(0)
    parts = [torch.randn(tokens, heads, WIDTH, dtype=torch.float64) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    parts[1] = parts[1].transpose(0, 1).contiguous().transpose(0, 1)  # another order in memory
    computed = attention_kernels.forward_by_length(*parts, call)
    expected = attention_kernels._plain_forward(*parts, call)
    for one, other in zip(computed, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    out, lse = expected[0] / 2, expected[1] + 0.7  # as after a merge with a prefix
    gradient = torch.randn_like(out)
    computed = attention_kernels.backward_by_length(gradient, *parts, out, lse, call)
    expected = attention_kernels._plain_backward(gradient, *parts, out, lse, call)
    for one, other in zip(computed, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_cudnn_serves_long_rows_alone(monkeypatch):
    """torch may not choose it for padded rows. vLLM's import forbids that, too, which changes nothing for long rows."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(attention_kernels, "_serves", lambda *_: True)
    query = torch.empty(LONG_SEGMENT, 1, WIDTH)
    for length, served in ((LONG_SEGMENT, True), (LONG_SEGMENT - 1, False)):
        row = Segments(torch.tensor([0, length], dtype=torch.int32), (length,))
        assert attention_kernels._has_long_segments(query, query, Call(row, row, 1.0)) is served


def test_runs_of_short_segments_stay_together():
    lengths = (3, 4, 16, 17, 2, 30, 1, 1)
    own = Segments(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), lengths)
    found = [(run.start, run.stop, part.lengths, part.bounds.tolist()) for run, part in own.runs(16)]
    assert found == [
        (0, 7, (3, 4), [0, 3, 7]), (7, 23, (16,), [0, 16]), (23, 40, (17,), [0, 17]), (40, 42, (2,), [0, 2]),
        (42, 72, (30,), [0, 30]), (72, 74, (1, 1), [0, 1, 2]),
    ]  # fmt: skip


def test_prefixes_are_computed_once_and_rows_go_on_behind_them():
    packed, whole = packed_rows(shares=True), packed_rows(shares=False)
    shared = packed.layout.shared
    assert shared.prefixes.lengths == (20, 33)
    assert len(whole.input_ids) - len(packed.input_ids) == 20 + 2 * 33
    assert packed.completion_ids.tolist() == whole.completion_ids.tolist()
    assert packed.layout.longest == whole.layout.longest == 52
    assert shared.queries.lengths == (1 + 3 + 9 + 1 + 30, 1 + 4 + 1 + 4 + 1 + 1 + 1 + 17)

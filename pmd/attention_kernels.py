"""The kernels behind attention over packed rows: output and log-sum-exp forward, gradients given both backward.

Segment i of the queries attends to segment i of the keys. On CUDA short segments go to torch's own flash attention, all
in one call, which `torch.nn.attention.varlen` wraps too. Long segments that attend to themselves go one by one to
cuDNN's attention, which torch brings as well: on Hopper it takes half the time (docs/gpu.md). It compiles a plan for
each new length, within a tenth of a second, so lengths are rounded up: causal rows never see the zeros behind them.

On a CPU a plain implementation computes segment by segment, for tests: exact but slow.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

#: Segments of so many tokens go to cuDNN, with their lengths rounded up to a multiple. Shorter ones gain nothing alone.
LONG_SEGMENT, LENGTH_STEP = 2048, 256
#: The oldest GPUs and the oldest cuDNN on which its attention was tried.
HOPPER, CUDNN_VERSION = (9, 0), 91900

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Segments:
    """Consecutive stretches of tokens."""

    bounds: Tensor  # [S + 1], int32: where each begins, and where the last ends; on the device
    lengths: tuple[int, ...]  # the same on the CPU, so that nothing waits for the device

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max(self.lengths)

    def slices(self) -> list[slice]:
        """Return where each segment lies."""
        ends = [0]
        for length in self.lengths:
            ends.append(ends[-1] + length)
        return [slice(start, end) for start, end in pairwise(ends)]

    def runs(self, long: int) -> Iterator[tuple[slice, "Segments"]]:
        """Yield where each segment of `long` tokens or more lies, and each run of shorter ones between them."""
        slices, first = self.slices(), 0
        while first < len(slices):
            after = first + 1
            while self.lengths[first] < long and after < len(slices) and self.lengths[after] < long:
                after += 1
            part = Segments(self.bounds[first : after + 1] - self.bounds[first], self.lengths[first:after])
            yield slice(slices[first].start, slices[after - 1].stop), part
            first = after


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the kernel: segment i of the queries attends to segment i of the keys.

    If causal, the last query of a segment sees its last key. `window` is how many keys a query sees at most.
    """

    queries: Segments
    keys: Segments
    scale: float
    causal: bool = True
    window: int | None = None


def forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return the output [T, heads, D] and the log-sum-exp of the scores [heads, T]."""
    if not query.is_cuda:
        return _plain_forward(query, key, value, call)
    if not _has_long_segments(query, key, call):
        return _flash_forward(query, key, value, call)
    return forward_by_length(query, key, value, call)


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients w.r.t. query, key and value, given the forward pass's output and log-sum-exp."""
    if not query.is_cuda:
        return _plain_backward(grad_out, query, key, value, out, lse, call)
    if not _has_long_segments(query, key, call):
        return _flash_backward(grad_out, query, key, value, out, lse, call)
    return backward_by_length(grad_out, query, key, value, out, lse, call)


def forward_by_length(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The same for segments that attend to themselves, causally: long ones alone, the others together."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[1], len(query), dtype=torch.promote_types(query.dtype, torch.float32))
    for tokens, part in call.queries.runs(LONG_SEGMENT):
        kernel = _flash_forward if part.longest < LONG_SEGMENT else _long_forward
        part_call = replace(call, queries=part, keys=part)
        out[tokens], lse[:, tokens] = kernel(query[tokens], key[tokens], value[tokens], part_call)
    return out, lse


def backward_by_length(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for segments that attend to themselves, causally: long ones alone, the others together."""
    like = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (query, key, value))
    grad_query, grad_key, grad_value = like
    for tokens, part in call.queries.runs(LONG_SEGMENT):
        kernel = _flash_backward if part.longest < LONG_SEGMENT else _long_backward
        parts = grad_out[tokens], query[tokens], key[tokens], value[tokens], out[tokens], lse[:, tokens]
        found = kernel(*parts, replace(call, queries=part, keys=part))
        grad_query[tokens], grad_key[tokens], grad_value[tokens] = found
    return grad_query, grad_key, grad_value


def _has_long_segments(query: Tensor, key: Tensor, call: Call) -> bool:
    """Whether cuDNN computes some of the segments."""
    plainly = call.queries is call.keys and _is_plainly_causal(call)
    if not plainly or call.queries.longest < LONG_SEGMENT:
        return False
    return _serves(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[2])


@cache
def _serves(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> bool:
    """Try cuDNN's attention once, forward and backward, beside flash attention."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(device) < HOPPER:
        return False
    if (torch.backends.cudnn.version() or 0) < CUDNN_VERSION:
        return False
    tokens, draw = LENGTH_STEP - 56, torch.Generator(device).manual_seed(0)
    shapes = ((tokens, heads, width), (tokens, kv_heads, width), (tokens, kv_heads, width), (tokens, heads, width))
    query, key, value, grad = (torch.randn(shape, generator=draw, device=device, dtype=dtype) for shape in shapes)
    row = Segments(torch.tensor([0, tokens], dtype=torch.int32, device=device), (tokens,))
    call = Call(row, row, width**-0.5)
    out, lse = _flash_forward(query, key, value, call)
    expected = (out, lse, *_flash_backward(grad, query, key, value, out, lse, call))
    try:
        out, lse = _long_forward(query, key, value, call)
        found = (out, lse, *_long_backward(grad, query, key, value, out, lse, call))
    except Exception as error:  # whatever it is, flash attention is there
        log.warning("cuDNN's attention fails here (%s); long rows use flash attention.", error)
        return False
    differs = any((one - other).norm() > 0.02 * other.norm() for one, other in zip(found, expected, strict=True))
    if differs:
        log.warning("cuDNN's attention differs from flash attention here; long rows use the latter.")
    return not differs


def _long_forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """`forward` for one segment that attends to itself, causally, by cuDNN."""
    parts = (_as_one_row(part) for part in (query, key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *parts, None, True, 0.0, True, False, scale=call.scale
    )
    return out[0].transpose(0, 1)[: len(query)], lse[0, :, : len(query), 0]


def _long_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, ...]:
    """`backward` for one segment that attends to itself, causally, by cuDNN."""
    num_tokens = len(query)
    grad_out, query, key, value, out = (_as_one_row(part) for part in (grad_out, query, key, value, out))
    length = query.shape[2]
    lse = torch.nn.functional.pad(lse, (0, length - num_tokens)).contiguous()[None, :, :, None]
    state = torch.zeros((), dtype=torch.int64, device=query.device)  # of dropout, of which there is none
    with torch._C._AutoDispatchBelowAutograd():  # above it, an operator cannot be told that there is no bias
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, query, key, value, out, lse, state, state, None, None, None, length, length, 0.0, True,
            scale=call.scale,
        )  # fmt: skip
    return tuple(gradient[0].transpose(0, 1)[:num_tokens] for gradient in gradients)


def _as_one_row(part: Tensor) -> Tensor:
    """Return a segment [T, heads, D] as a batch of one row [1, heads, T', D]: T rounded up, zeros behind it."""
    missing = -len(part) % LENGTH_STEP
    if missing:
        part = torch.nn.functional.pad(part, (0, 0, 0, 0, 0, missing))
    return part.contiguous().transpose(0, 1)[None]


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """`forward` for any segments, by torch's flash attention."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *_sizes(call), 0.0, _is_plainly_causal(call), False, **_options(call)
    )
    return out, lse


def _flash_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` for any segments, by torch's flash attention."""
    lse, unused = lse.contiguous(), torch.empty(0, device=query.device)
    random_state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # without dropout nothing reads it
    return torch.ops.aten._flash_attention_backward(
        grad_out, query, key, value, out, lse, *_sizes(call), 0.0, _is_plainly_causal(call), random_state, unused,
        **_options(call),
    )  # fmt: skip


def _sizes(call: Call) -> tuple[Tensor, Tensor, int, int]:
    return call.queries.bounds, call.keys.bounds, call.queries.longest, call.keys.longest


def _is_plainly_causal(call: Call) -> bool:
    """With a window, the kernel is told by the window alone."""
    return call.causal and call.window is None


def _options(call: Call) -> dict[str, Any]:
    left = -1 if call.window is None else call.window - 1
    return {"scale": call.scale, "window_size_left": left, "window_size_right": 0 if call.causal else -1}


def _plain_forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return what the kernel returns, with all scores of a segment at once."""
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[1], len(query), dtype=torch.promote_types(query.dtype, torch.float32))
    for mine, theirs in zip(call.queries.slices(), call.keys.slices(), strict=True):
        scores, values = _scores(query[mine], key[theirs], call), _per_head(value[theirs], query.shape[1])
        lse[:, mine] = scores.logsumexp(-1)
        probs = (scores - lse[:, mine, None]).exp()
        out[mine] = torch.einsum("hqk,khd->qhd", probs, values).to(out.dtype)
    return out, lse


def _plain_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients that flash attention's backward pass computes, by the same formulas."""
    heads, kv_heads = query.shape[1], key.shape[1]
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    delta = (_wide(grad_out) * _wide(out)).sum(-1).T  # [heads, T]
    for mine, theirs in zip(call.queries.slices(), call.keys.slices(), strict=True):
        probs = (_scores(query[mine], key[theirs], call) - lse[:, mine, None]).exp()
        given, values = _wide(grad_out[mine]), _per_head(value[theirs], heads)
        grad_probs = torch.einsum("qhd,khd->hqk", given, values)
        grad_scores = probs * (grad_probs - delta[:, mine, None]) * call.scale
        by_query = torch.einsum("hqk,khd->qhd", grad_scores, _per_head(key[theirs], heads))
        by_key = torch.einsum("hqk,qhd->khd", grad_scores, _wide(query[mine]))
        by_value = torch.einsum("hqk,qhd->khd", probs, given)
        grads[0][mine] = by_query.to(query.dtype)
        for grad, each in ((grads[1], by_key), (grads[2], by_value)):
            grad[theirs] = each.unflatten(1, (kv_heads, -1)).sum(2).to(grad.dtype)
    return grads


def _scores(query: Tensor, key: Tensor, call: Call) -> Tensor:
    """Return one segment's scaled scores [heads, queries, keys], -inf where a query does not see a key."""
    scores = torch.einsum("qhd,khd->hqk", _wide(query), _per_head(key, query.shape[1])) * call.scale
    last_seen = torch.arange(len(query))[:, None] + len(key) - len(query)
    distance = last_seen - torch.arange(len(key))  # [queries, keys]; below 0, the key is in the future
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if call.causal:
        hidden |= distance < 0
    if call.window is not None:
        hidden |= distance >= call.window
    return scores.masked_fill(hidden, -torch.inf)


def _per_head(keys: Tensor, heads: int) -> Tensor:
    """Repeat key-value heads for each head that they serve: [keys, heads, D]."""
    return _wide(keys).repeat_interleave(heads // keys.shape[1], 1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

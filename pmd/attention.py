"""Attention over packed rows, with the prompts that rows share computed once and never copied.

The T tokens of a micro-batch lie one after the other, without padding:

    [whole rows][shared prefixes][rows that continue a prefix, those of one prefix side by side]

Each of these segments attends to itself, causally. A row that continues a prefix also attends to the whole prefix: all
rows of a prefix together are one long query over its keys. The two results are merged by their log-sum-exps,

    out = w before + (1 - w) own,   w = sigmoid(lse_before - lse_own),   lse = logaddexp(lse_before, lse_own),

which is the softmax over both. So is the gradient: the backward pass of flash attention recomputes probabilities as
exp(score - lse), so each part, given the merged `out` and `lse`, returns its exact share.

In layers with a sliding window a row sees the end of its prefix only. There each row's keys are gathered behind its
prefix's, which copies keys and values but no queries, and one call does the rest.

The kernels are in attention_kernels.py.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pmd import attention_kernels as kernels
from pmd.attention_kernels import Call, Segments

#: The name under which transformers knows this attention.
NAME = "varlen"


@dataclass(frozen=True, slots=True)
class SharedLayout:
    """The rows that continue a prefix: the last `num_row_tokens` tokens, behind `num_prefix_tokens` of the prefixes."""

    num_prefix_tokens: int
    num_row_tokens: int
    queries: Segments  # of the rows' tokens: one for each prefix, over all rows that continue it
    prefixes: Segments  # of the prefixes' tokens
    key_index: Tensor  # positions of the keys of all segments, each row behind its prefix
    keys: Segments  # of those keys: one for each segment of `PackedLayout.own`


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Which of T packed tokens attends to which."""

    own: Segments  # whole rows, prefixes, and rows after their prefixes
    longest: int  # tokens of the longest row, its prefix included
    shared: SharedLayout | None = None


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scale: float,
    window: int | None = None,
    gather: bool = False,
) -> Tensor:
    """Return the attention output [T, heads, D] of packed tokens.

    Args:
        query: [T, heads, D].
        key: [T, key-value heads, D], as `value`; each key-value head serves the same number of heads.
        window: how many tokens a token sees, itself included; None for all before it.
        gather: copy each row's keys behind its prefix's, as layers with a window do.
    """
    window = None if window is None or window >= layout.longest else window
    if layout.shared is not None and window is None and not gather:
        return cast(Tensor, _Cascade.apply(query, key, value, layout, scale))
    keys, index = layout.own, None
    if layout.shared is not None:
        keys, index = layout.shared.keys, layout.shared.key_index
    return cast(Tensor, _Attention.apply(query, key, value, index, Call(layout.own, keys, scale, window=window)))


class _Attention(torch.autograd.Function):
    """One call; its keys and values may be gathered by an index, in the backward pass once more."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, index: Tensor | None, call: Call) -> Tensor:
        ctx.call = call
        gathered = (key, value) if index is None else (key[index], value[index])
        out, lse = kernels.forward(query, *gathered, call)
        ctx.save_for_backward(query, key, value, index, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, index, out, lse = ctx.saved_tensors
        gathered = (key, value) if index is None else (key[index], value[index])
        grad_query, *others = kernels.backward(grads[0], query, *gathered, out, lse, ctx.call)
        if index is not None:
            others = [_scattered(grad, index, len(key)) for grad in others]
        return grad_query, *others, None, None


class _Cascade(torch.autograd.Function):
    """Each segment over itself, then the rows over their prefixes; merged."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float) -> Tensor:
        shared = cast(SharedLayout, layout.shared)
        ctx.calls = Call(layout.own, layout.own, scale), Call(shared.queries, shared.prefixes, scale, causal=False)
        ctx.parts = _parts(len(query), shared)
        rows, prefixes = ctx.parts
        out, lse = kernels.forward(query, key, value, ctx.calls[0])
        before, lse_before = kernels.forward(query[rows], key[prefixes], value[prefixes], ctx.calls[1])
        share = torch.sigmoid(lse_before - lse[:, rows])  # [heads, row tokens]
        out[rows].lerp_(before, share.T[..., None].to(out.dtype))
        lse[:, rows] = torch.logaddexp(lse_before, lse[:, rows])
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        (rows, prefixes), (grad_out,) = ctx.parts, grads
        grad_query, grad_key, grad_value = kernels.backward(grad_out, query, key, value, out, lse, ctx.calls[0])
        parts = query[rows], key[prefixes], value[prefixes], out[rows], lse[:, rows].contiguous()
        before = kernels.backward(grad_out[rows], *parts, ctx.calls[1])
        grad_query[rows] += before[0]
        grad_key[prefixes] += before[1]
        grad_value[prefixes] += before[2]
        return grad_query, grad_key, grad_value, None, None


def _parts(num_tokens: int, shared: SharedLayout) -> tuple[slice, slice]:
    """Return where the rows that continue a prefix lie, and where the prefixes lie."""
    rows = slice(num_tokens - shared.num_row_tokens, num_tokens)
    return rows, slice(rows.start - shared.num_prefix_tokens, rows.start)


def _scattered(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Add up the gradients of gathered tokens, in float32 at least: a prefix has one from each of its rows."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    total = grad.new_zeros((num_tokens, *grad.shape[1:]), dtype=dtype)
    return total.index_add_(0, index, grad.to(dtype)).to(grad.dtype)


@torch.compiler.disable
def _attend(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, window: int | None
) -> Tensor:
    """Return what transformers expects, [1, T, heads, D]; the kernels take 16-bit numbers only."""
    dtype = value.dtype
    if value.is_cuda and dtype not in (torch.bfloat16, torch.float16):
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.bfloat16
    q, k, v = (part.transpose(1, 2)[0].to(dtype) for part in (query, key, value))
    return attend_packed(q, k, v, layout, scale=scale, window=window).to(value.dtype)[None]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_layout: PackedLayout | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks, [1, heads, T, D] to [1, T, heads, D]; without a layout as `sdpa` does."""
    if packed_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    scale = settings.get("scaling") or query.shape[-1] ** -0.5
    return cast(Any, _attend)(query, key, value, packed_layout, scale, settings.get("sliding_window")), None


def unsupported(model: PreTrainedModel) -> str | None:
    """Return what in a model's attention is not known here, or None."""
    config = model.config.get_text_config()
    if not (model._supports_attention_backend and model._supports_sdpa):
        return "computes attention in its own way"
    other = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if other:
        return f"has layers with {', '.join(sorted(other))}"
    if getattr(config, "attn_logit_softcapping", None):
        return "caps its attention scores"
    return None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
# On Hopper GPUs and later ones, torch would choose cuDNN's attention for padded rows, whose mask can make it give wrong
# outputs and NaN gradients (pytorch issues 193893 and 196678). vLLM's import forbids that choice, too. What
# attention_kernels.py calls by itself has no mask.
torch.backends.cuda.enable_cudnn_sdp(False)

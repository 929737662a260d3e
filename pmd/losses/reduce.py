"""Reduces per-token values to one number: a sum with weights fixed once for the whole optimizer step.

The weights of all tokens of a step add up to 1 (`token_weights`), so the losses and gradients of its micro-batches
simply add up, however the step was split. A token whose value is dropped or masked later keeps its place in the
denominator, as in SDPO's release: it counts as zero.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


def weighted_sum(per_token: Float[Tensor, " N"], token_weights: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """Return sum w_t x_t: this micro-batch's share of the step's mean."""
    return (per_token * token_weights).sum()


def clip_tokens(per_token: Float[Tensor, " N"], cap: float | None) -> Float[Tensor, " N"]:
    """Return min(x_t, cap), so that single tokens cannot rule a step; a token above the cap has no gradient.

    What is clipped is a token's whole value. A divergence is a sum over the vocabulary whose parts may be negative:
    clipped part by part, it would be another quantity, and its gradient would favour what was clipped.
    """
    return per_token if cap is None else torch.clamp(per_token, max=cap)


def token_weights(lengths: Sequence[int], reduction: Literal["token", "sequence"]) -> list[float]:
    """Return each rollout's weight per token, given the completion lengths of all rollouts of the step.

    `token`: every token of the step counts the same, 1 / sum of lengths. `sequence`: every rollout counts the same,
    1 / (number of rollouts x its length), which is how SDPO's release averages. An empty completion gets 0.
    """
    if reduction == "token":
        total = sum(lengths)
        return [1.0 / total if length else 0.0 for length in lengths]
    return [1.0 / (len(lengths) * length) if length else 0.0 for length in lengths]

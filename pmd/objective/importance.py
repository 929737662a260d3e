"""Importance weights of sampled tokens: constants to autograd, capped from above.

Two gaps are corrected. The policy may have moved since it sampled: `policy_ratio` = student / old policy. And the
engine's arithmetic differs from the trainer's: `engine_weight` = old policy / engine (truncated importance sampling
per token). The old policy's own log-probs are the student's where the weights are still those that sampled, so no
extra forward pass is needed; where they are not, the engine's stand in and one ratio covers both gaps (our choice).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImportanceWeights:
    """What corrects each token, and which tokens can be corrected at all."""

    old_logprobs: Float[Tensor, " N"]  # of the policy that sampled, as well as it is known; no gradient
    engine_weight: Float[Tensor, " N"]  # sg(min(old / engine, cap)); 0 where the engine reported nothing
    known: Bool[Tensor, " N"]

    @property
    def num_missing(self) -> int:
        """Count the tokens that are dropped for want of a sampling log-prob."""
        return int((~self.known).sum())


def importance_weights(
    student_logprobs: Float[Tensor, " N"],
    sampling_logprobs: Float[Tensor, " N"],
    on_policy: Bool[Tensor, " N"],
    engine_cap: float | None,
) -> ImportanceWeights:
    """Compare the student with what sampled. A missing log-prob (NaN) drops its token; it never means certainty.

    Args:
        on_policy: tokens sampled by the very weights that are being trained.
        engine_cap: cap on old / engine; None turns the correction off.
    """
    student, sampling = student_logprobs.detach(), sampling_logprobs.detach()
    known = ~sampling.isnan()
    # A dropped token is given the student's own log-prob: every ratio is 1 and finite, its weight of 0 removes it.
    sampling = torch.where(known, sampling, student)
    old = torch.where(on_policy, student, sampling)
    weight = torch.ones_like(old) if engine_cap is None else (old - sampling).exp().clamp(max=engine_cap)
    return ImportanceWeights(old, torch.where(known, weight, 0.0), known)


def policy_ratio(
    student_logprobs: Float[Tensor, " N"], old_logprobs: Float[Tensor, " N"], cap: float | None
) -> Float[Tensor, " N"]:
    """Return sg(min(student / old, cap)) (SDPO's clip); ones where the cap is None."""
    if cap is None:
        return torch.ones_like(old_logprobs)
    return (student_logprobs.detach() - old_logprobs.detach()).exp().clamp(max=cap)

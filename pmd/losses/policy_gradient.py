"""Group-relative policy gradient (GRPO as SDPO's release runs it, DAPO's asymmetric clip, dual clip).

A_i  = reward_i - mean reward of i's group            (over the rollouts that were scored)
r    = student probability / old policy's probability of the sampled token
loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),  where A < 0 at most dual_clip |A|
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# exp(20) is beyond any clip; without the bound exp overflows and its gradient is 0 * inf. As in SDPO's release.
LOG_RATIO_BOUND = 20.0
# Rewards of a group that differ by less than this many units in the last place are equal: a sum of 64 equal numbers is
# off by as much, and dividing by the standard deviation would turn such a residue into an advantage of order 1.
ROUNDING_UNITS = 8


def group_advantages(
    rewards: Float[Tensor, " B"],
    group_index: Int[Tensor, " B"],
    *,
    normalize_std: bool = False,
    valid: Bool[Tensor, " B"] | None = None,
    epsilon: float = 1e-6,
) -> Float[Tensor, " B"]:
    """Return reward minus the mean reward of the rollout's group; invalid rollouts are ignored and get 0.

    If all rewards of a group are equal, its advantages are exactly 0.

    Args:
        group_index: which group a rollout belongs to, any integers.
        normalize_std: divide by the group's sample standard deviation (n - 1) + epsilon (the original GRPO).
        valid: rollouts that were scored; the reward of the others is ignored and may be NaN.
    """
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    groups, index = group_index.unique(return_inverse=True)

    def group_sum(per_rollout: Tensor) -> Tensor:
        return rewards.new_zeros(len(groups)).index_add(0, index, torch.where(valid, per_rollout, 0.0))[index]

    count = group_sum(torch.ones_like(rewards))
    advantages = torch.where(
        valid & ~_all_equal(rewards, index, valid), rewards - group_sum(rewards) / count.clamp_min(1.0), 0.0
    )
    if normalize_std:
        variance = group_sum(advantages.square()) / (count - 1.0).clamp_min(1.0)
        advantages = advantages / (variance.sqrt() + epsilon)
    return advantages


def _all_equal(rewards: Float[Tensor, " B"], index: Int[Tensor, " B"], valid: Bool[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """Return for each rollout whether the valid rewards of its group are equal, up to rounding."""
    bounds = []
    for kind, empty in (("amax", -torch.inf), ("amin", torch.inf)):
        start = rewards.new_full((len(rewards),), empty)
        bounds.append(start.scatter_reduce(0, index, torch.where(valid, rewards, empty), kind)[index])
    largest, smallest = bounds
    return largest - smallest <= ROUNDING_UNITS * torch.finfo(rewards.dtype).eps * torch.maximum(
        largest.abs(), smallest.abs()
    )


def per_token_policy_loss(
    student_logprobs: Float[Tensor, "*N"],
    old_logprobs: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Float[Tensor, "*N"]:
    """Return -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = student / old policy.

    Where A < 0, the loss is bounded by -dual_clip A, so that a token that became much more likely cannot dominate.
    `old_logprobs` and `advantages` carry no gradient.
    """
    log_ratio = student_logprobs - old_logprobs.detach()
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    advantages = advantages.detach()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)

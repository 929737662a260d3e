"""Group-relative policy gradient (GRPO as SDPO's release runs it, DAPO's asymmetric clip, dual clip).

Advantages are centred on the group's mean reward, by default without dividing by its standard deviation.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def group_advantages(
    rewards: Float[Tensor, " B"],
    group_index: Int[Tensor, " B"],
    *,
    normalize_std: bool = False,
    valid: Bool[Tensor, " B"] | None = None,
    epsilon: float = 1e-6,
) -> Float[Tensor, " B"]:
    """Return reward minus the mean reward of the rollout's group; invalid rollouts count nowhere and get 0.

    Args:
        group_index: which group a rollout belongs to, any integers.
        normalize_std: divide by the group's population standard deviation + epsilon (the original GRPO).
        valid: rollouts whose verdict says something.
    """
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    _, index = group_index.unique(return_inverse=True)
    num_groups = int(index.max()) + 1
    kept = valid.to(rewards.dtype)

    def group_mean(per_rollout: Tensor) -> Tensor:
        total = rewards.new_zeros(num_groups).index_add(0, index, per_rollout * kept)
        count = rewards.new_zeros(num_groups).index_add(0, index, kept)
        return (total / count.clamp_min(1.0))[index]

    advantages = (rewards - group_mean(rewards)) * kept
    if normalize_std:
        advantages = advantages / (group_mean(advantages.square()).sqrt() + epsilon)
    return advantages


def per_token_policy_loss(
    student_logprobs: Float[Tensor, " N"],
    sampling_logprobs: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Float[Tensor, " N"]:
    """Return -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = student / sampling policy.

    Where A < 0, the loss is bounded by -dual_clip A, so that a token the student now much prefers cannot dominate.
    `sampling_logprobs` and `advantages` carry no gradient.
    """
    ratio = (student_logprobs - sampling_logprobs.detach()).exp()
    advantages = advantages.detach()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)

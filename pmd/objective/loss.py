"""The objective of one micro-batch: clipped policy gradient, distillation towards the teacher, and a KL anchor.

    loss = policy_gradient * PG + distillation * divergence(student, teacher) + kl_weight * KL(student || initial)

Every term is a weighted sum over tokens (reduce.py), so micro-batches add up to the step.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pmd.config import ObjectiveConfig
from pmd.objective.importance import importance_weights, policy_ratio
from pmd.objective.policy_gradient import per_token_policy_loss
from pmd.objective.reduce import weighted_sum


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Everything the objective reads, per completion token, rollout after rollout."""

    student_logprobs: Float[Tensor, " N"]  # carries the gradient
    sampling_logprobs: Float[Tensor, " N"]  # NaN where the engine reported none
    on_policy: Bool[Tensor, " N"]
    advantages: Float[Tensor, " N"]
    distillation_weights: Float[Tensor, " N"]  # 1 where the teacher saw something, else the anchor's weight
    token_weights: Float[Tensor, " N"]  # add up to 1 over the step
    per_token_divergence: Float[Tensor, " N"] | None  # student to teacher; carries the gradient
    per_token_initial_kl: Float[Tensor, " N"] | None  # KL(student || initial); carries the gradient


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss to differentiate, and its parts as plain numbers that add up over a step's micro-batches."""

    total: Float[Tensor, ""]
    parts: dict[str, float]


def combined_loss(inputs: LossInputs, config: ObjectiveConfig) -> Loss:
    """Return the weighted mix that `config` describes."""
    student, weights = inputs.student_logprobs, inputs.token_weights
    importance = importance_weights(student, inputs.sampling_logprobs, inputs.on_policy, config.engine_cap)
    total, parts = student.new_zeros(()), {}
    if config.policy_gradient > 0:
        per_token = per_token_policy_loss(
            student,
            importance.old_logprobs,
            inputs.advantages,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
        )
        policy_loss = weighted_sum(per_token * importance.engine_weight, weights)
        total, parts["loss/policy_gradient"] = total + config.policy_gradient * policy_loss, policy_loss.item()
    if inputs.per_token_divergence is not None:
        ratio = policy_ratio(student, importance.old_logprobs, config.importance_clip)
        per_token = inputs.per_token_divergence * ratio * importance.engine_weight * inputs.distillation_weights
        distillation = weighted_sum(per_token, weights)
        total, parts["loss/distillation"] = total + config.distillation * distillation, distillation.item()
    if inputs.per_token_initial_kl is not None:
        kl = weighted_sum(inputs.per_token_initial_kl, weights)
        total, parts["loss/initial_kl"] = total + config.kl_weight * kl, kl.item()
    parts["loss/total"] = total.item()
    if not total.requires_grad:  # no term is switched on: a zero that can still be differentiated
        total = total + 0.0 * student.sum()
    parts["sampling/missing_logprobs"] = float(importance.num_missing)
    parts["sampling/engine_gap"] = _engine_gap(inputs, importance.known)
    return Loss(total, parts)


@torch.no_grad()
def _engine_gap(inputs: LossInputs, known: Tensor) -> float:
    """Return the mean |student - sampling| log-prob, as this micro-batch's share of the step's mean."""
    gap = (inputs.student_logprobs - inputs.sampling_logprobs).abs()
    return float(weighted_sum(torch.where(known, gap, 0.0), inputs.token_weights))

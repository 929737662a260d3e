"""Importance weights, the reduction, and the mix of objectives, against numbers worked out by hand."""

import dataclasses
import math

import pytest
import torch

from pmd.config import ObjectiveConfig
from pmd.objective.importance import importance_weights, policy_ratio
from pmd.objective.loss import LossInputs, combined_loss
from pmd.objective.reduce import token_weights, weighted_sum

NAN = float("nan")


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_on_policy_tokens_are_compared_with_the_student_itself():
    """Old = student where the weights are those that sampled; the engine's gap is then the only correction."""
    weights = importance_weights(f64(-1.0, -1.0), f64(-1.2, -1.2), torch.tensor([True, False]), engine_cap=2.0)
    assert weights.old_logprobs.tolist() == [-1.0, -1.2]
    assert weights.engine_weight.tolist() == pytest.approx([math.exp(0.2), 1.0])


def test_the_engine_weight_is_capped():
    weights = importance_weights(f64(-1.0), f64(-3.0), torch.tensor([True]), engine_cap=2.0)
    assert weights.engine_weight.item() == 2.0
    assert importance_weights(f64(-1.0), f64(-3.0), torch.tensor([True]), None).engine_weight.item() == 1.0


def test_a_missing_logprob_drops_its_token_and_is_counted():
    weights = importance_weights(f64(-1.0, -1.0), f64(NAN, -1.0), torch.tensor([False, False]), 2.0)
    assert weights.engine_weight.tolist() == [0.0, 1.0]
    assert weights.num_missing == 1


def test_the_policy_ratio_is_capped_from_above_only_and_has_no_gradient():
    student = f64(-1.0, -1.0).requires_grad_()
    ratio = policy_ratio(student, f64(-3.0, -0.5), 2.0)
    assert ratio.tolist() == pytest.approx([2.0, math.exp(-0.5)])
    assert not ratio.requires_grad


def test_token_weights_by_hand():
    assert token_weights([1, 3], "token") == [0.25, 0.25]
    assert token_weights([1, 3], "sequence") == pytest.approx([0.5, 1 / 6])
    assert token_weights([0, 2], "sequence") == [0.0, 0.25]
    assert token_weights([0, 0], "token") == [0.0, 0.0]


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_weights_add_up_to_one(reduction):
    lengths = [3, 1, 7, 2]
    weights = token_weights(lengths, reduction)
    assert sum(n * w for n, w in zip(lengths, weights, strict=True)) == pytest.approx(1.0)


def inputs(**changes) -> LossInputs:
    values = LossInputs(
        student_logprobs=f64(-1.0, -2.0, -0.5).requires_grad_(),
        sampling_logprobs=f64(-1.0, -2.0, -0.5),
        on_policy=torch.tensor([True, True, True]),
        advantages=f64(0.5, 0.5, -0.5),
        distillation_weights=f64(1.0, 1.0, 0.0),
        token_weights=f64(1 / 3, 1 / 3, 1 / 3),
        per_token_divergence=f64(0.3, 0.6, 9.0).requires_grad_(),
        per_token_initial_kl=f64(0.1, 0.2, 0.3).requires_grad_(),
    )
    return dataclasses.replace(values, **changes)


def test_the_mix_by_hand():
    config = ObjectiveConfig(policy_gradient=2.0, distillation=3.0, kl_weight=0.5)
    loss = combined_loss(inputs(), config)
    policy = (-0.5 - 0.5 + 0.5) / 3
    distillation = (0.3 + 0.6) / 3  # the third rollout's teacher saw nothing: weight 0, and still in the denominator
    kl = (0.1 + 0.2 + 0.3) / 3
    assert loss.total.item() == pytest.approx(2.0 * policy + 3.0 * distillation + 0.5 * kl)
    assert loss.parts["loss/policy_gradient"] == pytest.approx(policy)
    assert loss.parts["loss/distillation"] == pytest.approx(distillation)
    assert loss.parts["loss/initial_kl"] == pytest.approx(kl)


def test_the_gradient_of_the_mix_by_hand():
    given = inputs()
    combined_loss(given, ObjectiveConfig(policy_gradient=2.0, distillation=3.0, kl_weight=0.5)).total.backward()
    assert given.student_logprobs.grad.tolist() == pytest.approx([-1 / 3, -1 / 3, 1 / 3])  # 2 x -A / 3 at ratio 1
    assert given.per_token_divergence.grad.tolist() == pytest.approx([1.0, 1.0, 0.0])
    assert given.per_token_initial_kl.grad.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6])


def test_a_stale_token_is_clipped_in_distillation_and_no_gradient_runs_through_the_ratio():
    given = inputs(on_policy=torch.tensor([False] * 3), sampling_logprobs=f64(-5.0, -2.0, -0.5))
    loss = combined_loss(given, ObjectiveConfig())
    assert loss.parts["loss/distillation"] == pytest.approx((2.0 * 0.3 + 0.6) / 3)
    loss.total.backward()
    assert given.student_logprobs.grad is None


def test_micro_batches_add_up():
    whole = inputs()
    config = ObjectiveConfig(policy_gradient=1.0, distillation=1.0)
    names = [field.name for field in dataclasses.fields(LossInputs)]
    parts = [LossInputs(**{n: getattr(whole, n)[cut] for n in names}) for cut in (slice(0, 1), slice(1, 3))]
    total = sum(combined_loss(part, config).total.item() for part in parts)
    assert total == pytest.approx(combined_loss(whole, config).total.item(), abs=1e-12)


def test_nothing_switched_on_can_still_be_differentiated():
    given = inputs(per_token_divergence=None, per_token_initial_kl=None)
    loss = combined_loss(given, ObjectiveConfig(policy_gradient=0.0, distillation=0.0))
    loss.total.backward()
    assert given.student_logprobs.grad.tolist() == [0.0, 0.0, 0.0]


def test_a_weighted_sum_is_a_sum():
    assert weighted_sum(f64(1.0, 2.0, 3.0), f64(0.5, 0.25, 0.0)).item() == 1.0

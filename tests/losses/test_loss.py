"""Importance weights, the reduction, and the mix of objectives, against numbers worked out by hand."""

import dataclasses
import math

import pytest
import torch

from pmd.batch import CompletionTokens
from pmd.config.schema import ObjectiveConfig
from pmd.losses.distillation import TokenTerms, importance_weights, policy_ratio
from pmd.losses.reduce import token_weights, weighted_sum
from pmd.module import Loss, combined_loss

NAN, VERSION = float("nan"), 5


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_on_policy_tokens_are_compared_with_the_student_itself():
    """Old = student where the weights are those that sampled; the engine's gap is then the only correction."""
    weights = importance_weights(f64(-1.0, -1.0), f64(-1.2, -1.2), torch.tensor([True, False]), tis_cap=2.0)
    assert weights.old_logprobs.tolist() == [-1.0, -1.2]
    assert weights.tis.tolist() == pytest.approx([math.exp(0.2), 1.0])


def test_the_tis_weight_is_capped():
    weights = importance_weights(f64(-1.0), f64(-3.0), torch.tensor([True]), tis_cap=2.0)
    assert weights.tis.item() == 2.0
    assert importance_weights(f64(-1.0), f64(-3.0), torch.tensor([True]), None).tis.item() == 1.0


def test_a_missing_logprob_drops_its_token_and_is_counted():
    weights = importance_weights(f64(-1.0, -1.0), f64(NAN, -1.0), torch.tensor([False, False]), 2.0)
    assert weights.tis.tolist() == [0.0, 1.0]
    assert weights.known.tolist() == [False, True]


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


def terms_of(**changes) -> TokenTerms:
    values = TokenTerms(
        student_logprobs=f64(-1.0, -2.0, -0.5).requires_grad_(),
        entropy=f64(0.0, 0.0, 0.0),
        per_token_divergence=f64(0.3, 0.6, 9.0).requires_grad_(),
        teacher_logprobs=f64(-1.0, -1.0, -1.0),
        per_token_reference_kl=f64(0.1, 0.2, 0.3).requires_grad_(),
    )
    return dataclasses.replace(values, **changes)


def tokens_of(**changes) -> CompletionTokens:
    values = CompletionTokens(
        sampling_logprobs=f64(-1.0, -2.0, -0.5),
        policy_versions=torch.tensor([VERSION] * 3),
        advantages=f64(0.5, 0.5, -0.5),
        distillation_weights=f64(1.0, 1.0, 0.0),
        token_weights=f64(1 / 3, 1 / 3, 1 / 3),
    )
    return dataclasses.replace(values, **changes)


def loss_of(terms: TokenTerms, tokens: CompletionTokens, **config) -> Loss:
    return combined_loss(terms, tokens, VERSION, ObjectiveConfig(**config))


def test_the_mix_by_hand():
    loss = loss_of(terms_of(), tokens_of(), policy_gradient=2.0, distillation=3.0, kl_weight=0.5)
    policy = (-0.5 - 0.5 + 0.5) / 3
    distillation = (0.3 + 0.6) / 3  # the third rollout's teacher saw nothing: weight 0, and still in the denominator
    kl = (0.1 + 0.2 + 0.3) / 3
    assert loss.total.item() == pytest.approx(2.0 * policy + 3.0 * distillation + 0.5 * kl)
    assert loss.parts["loss/policy_gradient"] == pytest.approx(policy)
    assert loss.parts["loss/distillation"] == pytest.approx(distillation)
    assert loss.parts["loss/reference_kl"] == pytest.approx(kl)


def test_the_gradient_of_the_mix_by_hand():
    terms = terms_of()
    loss_of(terms, tokens_of(), policy_gradient=2.0, distillation=3.0, kl_weight=0.5).total.backward()
    assert terms.student_logprobs.grad.tolist() == pytest.approx([-1 / 3, -1 / 3, 1 / 3])  # 2 x -A / 3 at ratio 1
    assert terms.per_token_divergence.grad.tolist() == pytest.approx([1.0, 1.0, 0.0])
    assert terms.per_token_reference_kl.grad.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6])


def test_a_stale_token_is_clipped_in_distillation_and_no_gradient_runs_through_the_ratio():
    terms = terms_of(per_token_reference_kl=None)
    stale = tokens_of(policy_versions=torch.tensor([VERSION - 1] * 3), sampling_logprobs=f64(-5.0, -2.0, -0.5))
    loss = loss_of(terms, stale)
    assert loss.parts["loss/distillation"] == pytest.approx((2.0 * 0.3 + 0.6) / 3)
    loss.total.backward()
    assert terms.student_logprobs.grad is None


def test_a_missing_logprob_is_counted_and_leaves_the_gap_to_the_engine_alone():
    loss = loss_of(terms_of(), tokens_of(sampling_logprobs=f64(NAN, -2.5, -0.5)))
    assert loss.parts["sampling/missing_logprobs"] == 1.0
    assert loss.parts["sampling/engine_gap"] == pytest.approx(0.5 / 3)


def test_micro_batches_add_up():
    terms, tokens = terms_of(), tokens_of()

    def cut(values, part: slice):
        fields = {f.name: getattr(values, f.name)[part] for f in dataclasses.fields(values)}
        return dataclasses.replace(values, **fields)

    config = {"policy_gradient": 1.0, "distillation": 1.0}
    total = sum(
        loss_of(cut(terms, part), cut(tokens, part), **config).total.item() for part in (slice(0, 1), slice(1, 3))
    )
    assert total == pytest.approx(loss_of(terms, tokens, **config).total.item(), abs=1e-12)


def test_nothing_switched_on_can_still_be_differentiated():
    terms = terms_of(per_token_divergence=None, per_token_reference_kl=None)
    loss_of(terms, tokens_of(), policy_gradient=0.0, distillation=0.0).total.backward()
    assert terms.student_logprobs.grad.tolist() == [0.0, 0.0, 0.0]


def test_a_weighted_sum_is_a_sum():
    assert weighted_sum(f64(1.0, 2.0, 3.0), f64(0.5, 0.25, 0.0)).item() == 1.0

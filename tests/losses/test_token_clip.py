"""`objective.token_clip`: a token's whole divergence is clipped, alike in both implementations, gradient included."""

from dataclasses import replace

import pytest
import torch
from examples import CPU, backward, gradient_of, tiny_module, varied_examples

from pmd.batch import Batch
from pmd.config.schema import ObjectiveConfig
from pmd.losses.reduce import clip_tokens
from pmd.module import combined_loss


def scores_of(module):
    for micro_batch in Batch(tuple(varied_examples()), 0, 0).micro_batches(module.layout, CPU):
        yield micro_batch, module._score(micro_batch)


def loss_of(module, terms, tokens):
    return combined_loss(terms, tokens, module.policy_version, module.objective).total


def test_by_hand():
    per_token = torch.tensor([0.5, 3.0, -1.0, 2.0], requires_grad=True)
    clipped = clip_tokens(per_token, 2.0)
    assert clipped.tolist() == [0.5, 2.0, -1.0, 2.0]
    (gradient,) = torch.autograd.grad(clipped.sum(), per_token)
    assert gradient[:3].tolist() == [1.0, 0.0, 1.0]
    assert clip_tokens(per_token, None) is per_token


@pytest.mark.parametrize("alpha", [0.5, 1.0])  # the parts of both may be negative
def test_both_implementations_clip_the_sum(alpha):
    objective = ObjectiveConfig(alpha=alpha)
    module = tiny_module(objective, finetune="lora")
    free = backward(module, varied_examples())
    values = torch.cat([terms.per_token_divergence.detach() for _, terms in free.scored])
    cap = values.median().item()

    found = {}
    for implementation in ("fused", "reference"):
        module.objective = replace(objective, token_clip=cap, implementation=implementation)
        step = backward(module, varied_examples())
        found[implementation] = gradient_of(module).clone(), step.totals
    (fused, totals), (reference, other) = found["fused"], found["reference"]
    assert torch.allclose(fused, reference, rtol=1e-4, atol=1e-7)
    assert totals == pytest.approx(other, rel=1e-4)
    assert 0.0 < totals["student/clipped_tokens"] < 1.0
    assert totals["loss/distillation"] < free.totals["loss/distillation"]

    # The same as leaving the clipped tokens out of the backward pass.
    module.objective = objective
    module.zero_grad()
    for micro_batch, terms in scores_of(module):
        kept = terms.per_token_divergence.detach() <= cap
        tokens = replace(micro_batch.tokens, distillation_weights=micro_batch.tokens.distillation_weights * kept)
        loss_of(module, terms, tokens).backward()
    assert torch.allclose(gradient_of(module), fused, rtol=1e-4, atol=1e-7)

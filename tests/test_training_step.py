"""One step's gradient: the same however the step is split, ordered and padded; the teacher gets none."""

import random
from dataclasses import replace

import pytest
import torch
from examples import (
    CPU,
    backward,
    examples_of_one_prompt,
    gradient_of,
    tiny_module,
    varied_examples,
)
from torch import Tensor

from pmd.batch import Batch, Example, pad_sequences
from pmd.config.schema import ObjectiveConfig, RolloutsConfig, TeacherConfig
from pmd.module import PMDModule

METHODS = {
    "grpo": ObjectiveConfig(policy_gradient=1.0, distillation=0.0, kl_weight=0.05),
    "sdpo": ObjectiveConfig(alpha=0.5, top_k=20, no_context_weight=0.0, reduction="sequence"),
    "pmd": ObjectiveConfig(alpha="symmetric"),
    "mix": ObjectiveConfig(policy_gradient=0.5, distillation=0.5, alpha=1.0, top_k=5, reduction="sequence"),
}


def split_gradient(module: PMDModule, examples: list[Example], max_tokens: int) -> tuple[Tensor, float, int]:
    """Return gradient and loss of a step in micro-batches of `max_tokens`, and how many there were."""
    module.layout = replace(module.layout, max_tokens=max_tokens)
    found = backward(module, examples)
    return gradient_of(module), found.totals["loss/total"], len(found.scored)


@pytest.mark.parametrize("finetune", ["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_split_order_and_padding_change_nothing(method, finetune):
    module, examples = tiny_module(METHODS[method], finetune=finetune), varied_examples()
    whole, loss, count = split_gradient(module, examples, 100_000)
    assert count == 1
    assert whole.abs().max() > 0
    random.Random(1).shuffle(examples)
    counts = set()
    for max_tokens in (1, 50, 110, 200):
        split, split_loss, count = split_gradient(module, examples, max_tokens)
        counts.add(count)
        assert split_loss == pytest.approx(loss, abs=1e-6)
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6)
    assert max(counts) == 8
    assert len(counts) >= 3


def test_masked_rollouts_keep_their_place_in_the_denominator():
    """SDPO: a rollout whose teacher saw nothing adds nothing, and the rest weigh as if it were there."""
    module, examples = tiny_module(METHODS["sdpo"]), varied_examples()
    both, _, _ = split_gradient(module, examples, 100_000)
    shown = [example for example in examples if example.context.shows_anything]
    alone, _, _ = split_gradient(module, shown, 100_000)
    assert len(shown) < len(examples)
    torch.testing.assert_close(both, alone * len(shown) / len(examples), rtol=1e-4, atol=1e-6)


def test_student_and_teacher_score_the_same_tokens():
    layout = replace(tiny_module().layout, max_tokens=90)
    for micro_batch in Batch(tuple(varied_examples()), 0, 0).micro_batches(layout, CPU):
        expected = [token for e in micro_batch.examples for token in e.completion_ids]
        assert micro_batch.student.completion_ids.tolist() == expected
        assert micro_batch.teacher.completion_ids.tolist() == expected


def test_padding_is_neither_attended_to_nor_scored():
    sequences = pad_sequences([((5, 6), (7,)), ((5,), (6, 7, 8, 9))], 0, CPU)
    assert sequences.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert sequences.completion_mask.tolist() == [[False, False, True, False, False], [False, True, True, True, True]]


@pytest.mark.parametrize("kind", ["live", "trust_region"])
def test_a_teacher_that_is_the_student_scores_without_its_dropout(kind):
    teacher = TeacherConfig(kind=kind, trust_region_rate=0.5)
    module = tiny_module(METHODS["pmd"], teacher=teacher, finetune="lora", lora_dropout=0.5)
    with torch.no_grad():
        for name, parameter in module.policy.named_parameters():
            if "lora_B.student" in name:
                parameter.normal_(0.0, 0.1)
    one, two = (backward(module, varied_examples()).scored[0][1] for _ in range(2))
    assert torch.equal(one.teacher_logprobs, two.teacher_logprobs)
    assert not torch.allclose(one.student_logprobs, two.student_logprobs)


@pytest.mark.parametrize("finetune", ["full", "lora"])
@pytest.mark.parametrize("kind", ["frozen", "live", "trust_region"])
def test_checkpointing_and_shared_prompts_change_no_gradient(kind, finetune):
    gradients, examples = [], examples_of_one_prompt()
    for checkpointing in (False, True):
        module = tiny_module(
            METHODS["pmd"],
            teacher=TeacherConfig(kind=kind),
            rollouts=RolloutsConfig(share_prefixes="both"),
            finetune=finetune,
            gradient_checkpointing=checkpointing,
        )
        for shared in (module.layout.shared, frozenset()):
            module.layout = replace(module.layout, shared=shared)
            ((micro_batch, _),) = backward(module, examples).scored
            assert (micro_batch.teacher.prefixes is not None) == bool(shared)
            assert (micro_batch.student.prefixes is not None) == (bool(shared) and not checkpointing)
            gradients.append(gradient_of(module))
    assert len(gradients) == 4
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_packed_rows_and_every_way_of_recomputing_change_no_gradient(finetune):
    """With rows packed, prompts are shared while layers are recomputed, too."""
    gradients, losses, examples = {}, {}, examples_of_one_prompt()
    for attention, mode in (("sdpa", False), *(("varlen", mode) for mode in (False, "selective", True))):
        module = tiny_module(METHODS["pmd"], finetune=finetune, attention=attention, gradient_checkpointing=mode)
        for shared in (module.layout.shared, frozenset()) if attention == "varlen" else (frozenset(),):
            module.layout = replace(module.layout, shared=shared)
            found = backward(module, examples)
            ((micro_batch, _),) = found.scored
            if attention == "varlen":
                layouts = micro_batch.student.layout, micro_batch.teacher.layout
                assert all((layout.shared is not None) == bool(shared) for layout in layouts)
            key = attention, mode, bool(shared)
            gradients[key], losses[key] = gradient_of(module), found.totals["loss/total"]
    assert len(gradients) == 1 + 3 * 2
    for key, gradient in gradients.items():
        assert losses[key] == pytest.approx(losses["sdpa", False, False], abs=1e-6)
        torch.testing.assert_close(gradient, gradients["sdpa", False, False], rtol=1e-4, atol=1e-6)


def test_a_step_without_any_scored_rollout_has_no_micro_batches():
    assert list(Batch((), 0, 0).micro_batches(tiny_module().layout, CPU)) == []

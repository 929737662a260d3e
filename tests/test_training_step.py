"""One optimizer step's gradient: the same however the step is split, ordered and padded; the teacher stays still."""

import random
from collections import Counter

import pytest
import torch

from pmd.batch import Batch, Example, pad_sequences
from pmd.config.schema import ModelConfig, ObjectiveConfig, RolloutsConfig, RunConfig, TeacherConfig
from pmd.module import PMDModule, combined_loss
from pmd.teacher import TeacherContext
from pmd.types import Completion, Rollout, Verdict

METHODS = {
    "grpo": ObjectiveConfig(policy_gradient=1.0, distillation=0.0, kl_weight=0.05),
    "sdpo": ObjectiveConfig(alpha=0.5, top_k=20, no_context_weight=0.0, reduction="sequence"),
    "pmd": ObjectiveConfig(alpha="symmetric"),
    "mix": ObjectiveConfig(policy_gradient=0.5, distillation=0.5, alpha=1.0, top_k=5, reduction="sequence"),
}


def examples(count: int = 8) -> list[Example]:
    """Rollouts of many lengths, from prompts of many lengths, some sampled by older weights."""
    draw = random.Random(0)
    made = []
    for number in range(count):
        lengths = [draw.randrange(low, high) for low, high in ((4, 20), (6, 40), (1, 9))]
        prompt, shown, completion = (tuple(draw.randrange(3, 110) for _ in range(length)) for length in lengths)
        logprobs = tuple(-draw.random() * 4 for _ in completion[1:])
        record = Completion(completion, (None, *logprobs) if number == 3 else (-1.0, *logprobs), "", "stop", number % 2)
        rollout = Rollout(f"r{number}", f"g{number // 2}", f"t{number // 2}", prompt, record, Verdict(1.0, True, "ok"))
        context = TeacherContext(rollout.rollout_id, shown, success="yes" if number % 3 else None)
        made.append(Example(rollout, draw.random() - 0.5, context))
    return made


def module_for(objective: ObjectiveConfig, micro_batch_tokens: int, finetune: str = "full") -> PMDModule:
    return PMDModule(
        RunConfig(
            model=ModelConfig(path="tiny", finetune=finetune, lora_rank=4),
            teacher=TeacherConfig(kind="frozen"),
            objective=objective,
            rollouts=RolloutsConfig(micro_batch_tokens=micro_batch_tokens),
        )
    )


def gradient(module: PMDModule, batch: Batch) -> tuple[torch.Tensor, float, int]:
    """Return the step's gradient as one vector, its loss, and how many micro-batches it took."""
    module.seconds, total, count = Counter(), 0.0, 0
    for micro_batch in batch.micro_batches(module.layout, torch.device("cpu")):
        terms = module._score(micro_batch)
        loss = combined_loss(terms, micro_batch.tokens, module.policy_version, module.objective)
        loss.total.backward()
        total, count = total + loss.total.item(), count + 1
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.cat([p.grad.flatten() for p in trained if p.grad is not None]), total, count


@pytest.mark.parametrize("finetune", ["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_split_order_and_padding_change_nothing(method, finetune):
    rows = examples()
    whole, loss, count = gradient(module_for(METHODS[method], 100_000, finetune), Batch(tuple(rows), 0, 0))
    assert count == 1
    assert whole.abs().max() > 0
    random.Random(1).shuffle(rows)
    splits = set()
    for tokens in (1, 50, 110, 200):
        split, split_loss, count = gradient(module_for(METHODS[method], tokens, finetune), Batch(tuple(rows), 0, 0))
        splits.add(count)
        assert split_loss == pytest.approx(loss, abs=1e-6)
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6)
    assert {8}.issubset(splits)
    assert len(splits) >= 3


def test_the_teacher_gets_no_gradient_and_does_not_move():
    module = module_for(METHODS["pmd"], 200)
    before = {name: value.clone() for name, value in module.policy.reference.state_dict().items()}
    gradient(module, Batch(tuple(examples()), 0, 0))
    assert all(p.grad is None for p in module.policy.reference.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.policy.reference.state_dict().items())


def test_masked_rollouts_keep_their_place_in_the_denominator():
    """SDPO: a rollout whose teacher saw nothing adds nothing, and the rest weigh as if it were there."""
    rows = examples()
    config = METHODS["sdpo"]
    both, _, _ = gradient(module_for(config, 100_000), Batch(tuple(rows), 0, 0))
    shown = [row for row in rows if row.context.shows_anything]
    alone, _, _ = gradient(module_for(config, 100_000), Batch(tuple(shown), 0, 0))
    torch.testing.assert_close(both, alone * len(shown) / len(rows), rtol=1e-4, atol=1e-6)


def test_student_and_teacher_score_the_same_tokens():
    rows = examples()
    for micro_batch in Batch(tuple(rows), 0, 0).micro_batches(
        module_for(METHODS["pmd"], 90).layout, torch.device("cpu")
    ):
        expected = [token for e in micro_batch.examples for token in e.completion_ids]
        assert micro_batch.student.completion_ids.tolist() == expected
        assert micro_batch.teacher.completion_ids.tolist() == expected


def test_padding_is_neither_attended_to_nor_scored():
    sequences = pad_sequences([((5, 6), (7,)), ((5,), (6, 7, 8, 9))], 0, torch.device("cpu"))
    assert sequences.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert sequences.completion_mask.tolist() == [[False, False, True, False, False], [False, True, True, True, True]]


@pytest.mark.parametrize("kind", ["live", "trust_region"])
def test_a_teacher_that_is_the_student_scores_without_its_dropout(kind):
    module = PMDModule(
        RunConfig(
            model=ModelConfig(path="tiny", finetune="lora", lora_rank=4, lora_dropout=0.5),
            teacher=TeacherConfig(kind=kind, trust_region_rate=0.5),
            objective=METHODS["pmd"],
        )
    )
    with torch.no_grad():
        for name, parameter in module.policy.named_parameters():
            if "lora_B.student" in name:
                parameter.normal_(0.0, 0.1)
    (micro_batch,) = Batch(tuple(examples()), 0, 0).micro_batches(module.layout, torch.device("cpu"))
    one, two = (module._score(micro_batch)[0] for _ in range(2))
    assert torch.equal(one.teacher_logprobs, two.teacher_logprobs)
    assert not torch.allclose(one.student_logprobs, two.student_logprobs)


@pytest.mark.parametrize("finetune", ["full", "lora"])
@pytest.mark.parametrize("kind", ["frozen", "live", "trust_region"])
def test_checkpointing_and_shared_prompts_change_no_gradient(kind, finetune):
    draw = random.Random(3)
    prompt, shown = (tuple(draw.randrange(3, 110) for _ in range(length)) for length in (160, 170))
    rows = []
    for number in range(8):
        completion = tuple(draw.randrange(3, 110) for _ in range(draw.randrange(1, 9)))
        record = Completion(completion, (-1.0,) * len(completion), "", "stop", 0)
        rollout = Rollout(f"r{number}", "g", "t", prompt, record, Verdict(1.0, True, "ok"))
        rows.append(Example(rollout, 0.5, TeacherContext(rollout.rollout_id, shown, success="yes")))
    found = []
    for checkpointing, share in ((False, "off"), (True, "off"), (False, "both"), (True, "both")):
        module = PMDModule(
            RunConfig(
                model=ModelConfig(path="tiny", finetune=finetune, lora_rank=4, gradient_checkpointing=checkpointing),
                teacher=TeacherConfig(kind=kind),
                objective=METHODS["pmd"],
                rollouts=RolloutsConfig(share_prefixes=share),
            )
        )
        (micro_batch,) = Batch(tuple(rows), 0, 0).micro_batches(module.layout, torch.device("cpu"))
        assert (micro_batch.teacher.prefixes is not None) == (share == "both")
        assert (micro_batch.student.prefixes is not None) == (share == "both" and not checkpointing)
        found.append(gradient(module, Batch(tuple(rows), 0, 0))[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_a_step_without_any_scored_rollout_changes_nothing():
    module = module_for(METHODS["pmd"], 200)
    assert list(Batch((), 0, 0).micro_batches(module.layout, torch.device("cpu"))) == []

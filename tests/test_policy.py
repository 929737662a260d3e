"""Roles: who is trained, who is frozen, who follows; for whole weights and for adapters."""

import re

import pytest
import torch
from examples import small_qwen
from transformers import PreTrainedModel

from pmd.batch import Sequences
from pmd.config.schema import ModelConfig, TeacherConfig
from pmd.losses.distillation import TeacherPart
from pmd.losses.fused import token_terms
from pmd.policy import Policy, make_policy
from pmd.pretrained import load_base
from pmd.scoring import completion_hidden_states, output_head

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
REAL = torch.ones_like(IDS)
SCORED = torch.arange(8)[None] >= 4
KINDS = ["frozen", "ema", "live", "trust_region"]


def base() -> PreTrainedModel:
    return small_qwen(20, tie_word_embeddings=True)


def policy_of(finetune: str, **teacher) -> Policy:
    torch.manual_seed(1)
    model = ModelConfig(finetune=finetune, lora_rank=2, lora_alpha=4.0)
    return make_policy(base(), model, TeacherConfig(**teacher), needs_reference=True)


def hidden_of(policy: Policy, role) -> torch.Tensor:
    with torch.no_grad(), policy.weights(role) as model:
        return completion_hidden_states(model, Sequences(IDS, REAL, SCORED))


def distil(policy: Policy, rate: float = 0.5) -> None:
    """One step of gradient descent towards a shifted teacher, as the training step takes it."""
    parts = []
    for role, weight in policy.teacher_mixture:
        with torch.no_grad(), policy.weights(role) as model:
            parts.append(
                TeacherPart(
                    completion_hidden_states(model, Sequences(IDS.flip(1), REAL, SCORED)), output_head(model), weight
                )
            )
    trained = [p for p in policy.parameters() if p.requires_grad]
    with policy.weights("student") as model:
        hidden = completion_hidden_states(model, Sequences(IDS, REAL, SCORED))
        terms = token_terms(hidden, output_head(model), IDS[SCORED], parts, alpha="symmetric")
    terms.per_token_divergence.mean().backward()
    with torch.no_grad():
        for parameter in trained:
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
                parameter.grad = None
    policy.after_rollout_batch()


@pytest.mark.parametrize("finetune", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_student_moves_and_nothing_else_gets_a_gradient(finetune, kind):
    policy = policy_of(finetune, kind=kind)
    reference, student = hidden_of(policy, "reference"), hidden_of(policy, "student")
    names = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert names
    assert all(name.startswith("student.") or ".student." in name for name in names)
    for _ in range(3):  # the adapter's B starts at zero, so A moves from the second step on
        distil(policy)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == names
    assert all(p.grad is None for p in policy.parameters())
    assert not torch.allclose(hidden_of(policy, "student"), student)
    assert torch.equal(hidden_of(policy, "reference"), reference)


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_a_frozen_teacher_stays_and_a_live_one_is_the_student(finetune):
    frozen, live = policy_of(finetune, kind="frozen"), policy_of(finetune, kind="live")
    before = hidden_of(frozen, "teacher")
    for policy in (frozen, live):
        distil(policy)
    assert torch.equal(hidden_of(frozen, "teacher"), before)
    assert torch.equal(hidden_of(live, "teacher"), hidden_of(live, "student"))


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_ema_has_its_closed_form(finetune):
    """teacher_n = (1 - r)^n student_0 + r sum_i (1 - r)^(n - i) student_i, for every tensor."""
    rate, steps = 0.25, 4
    policy = policy_of(finetune, kind="ema", ema_rate=rate)
    history = [[student.detach().clone() for _, student in policy.teacher_pairs()]]
    for _ in range(steps):
        distil(policy)
        history.append([student.detach().clone() for _, student in policy.teacher_pairs()])
    moved = 0.0
    for index, (teacher, _) in enumerate(policy.teacher_pairs()):
        expected = (1 - rate) ** steps * history[0][index]
        for i in range(1, steps + 1):
            expected = expected + rate * (1 - rate) ** (steps - i) * history[i][index]
        torch.testing.assert_close(teacher, expected, rtol=1e-5, atol=1e-7)
        moved += (teacher - history[0][index]).abs().sum().item()
    assert moved > 0


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_a_refreshed_teacher_takes_the_student_when_it_is_due(finetune):
    policy = policy_of(finetune, kind="frozen", refresh_epochs=2)
    before = hidden_of(policy, "teacher")
    distil(policy)
    assert not policy.after_epoch(0)
    assert torch.equal(hidden_of(policy, "teacher"), before)
    assert policy.after_epoch(1)
    torch.testing.assert_close(hidden_of(policy, "teacher"), hidden_of(policy, "student"))


def test_a_trust_region_teacher_mixes_logits():
    policy = policy_of("full", kind="trust_region", trust_region_rate=0.3)
    assert policy.teacher_mixture == [("reference", 0.7), ("student", 0.3)]
    assert policy.resolve("teacher") == "reference"


def test_an_adapter_starts_as_its_base():
    policy = policy_of("lora", kind="ema")
    torch.testing.assert_close(hidden_of(policy, "student"), hidden_of(policy, "reference"))
    torch.testing.assert_close(hidden_of(policy, "teacher"), hidden_of(policy, "student"))


def test_two_builds_have_the_same_adapters():
    one, two = policy_of("lora", kind="ema"), policy_of("lora", kind="ema")
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("finetune", "kind"), [("full", "frozen"), ("full", "ema"), ("lora", "frozen"), ("lora", "ema")]
)
def test_a_checkpoint_holds_what_cannot_be_loaded_again(finetune, kind):
    policy = policy_of(finetune, kind=kind)
    kept = [name for name in policy.state_dict() if policy.is_own_state(name)]
    assert not any(name.startswith("reference.") or "base_layer" in name for name in kept)
    assert any("student" in name for name in kept)
    assert any("teacher" in name for name in kept) == (kind == "ema")


def test_frozen_weights_stay_in_eval_mode():
    policy = policy_of("full", kind="ema")
    policy.train()
    with policy.weights("teacher") as teacher, policy.weights("student") as student:
        assert not teacher.training
        assert student.training


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_the_student_starts_in_training_mode_throughout(finetune):
    """Models are loaded in eval mode, in which dropout and gradient checkpointing silently do nothing."""
    policy = policy_of(finetune, kind="frozen")
    with policy.weights("student") as student:
        assert all(module.training for module in student.modules())
    with policy.weights("reference") as reference:
        assert not any(module.training for module in reference.modules())


@pytest.mark.parametrize("finetune", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [True, False, "auto", "selective"])
def test_gradient_checkpointing_runs_each_layer_again_in_the_backward_pass(finetune, checkpointing):
    """`selective` recomputes the first layer and every second one after it; on a CPU, `auto` recomputes none."""
    config = ModelConfig(path="tiny", finetune=finetune, lora_rank=2, gradient_checkpointing=checkpointing)
    policy = make_policy(load_base(config), config, TeacherConfig())
    with policy.weights("student") as model:
        named = ((module, re.search(r"layers\.(\d)\.mlp$", name)) for name, module in model.named_modules())
        layers, passes = {module: int(found[1]) for module, found in named if found}, []
        for layer in layers:
            layer.register_forward_pre_hook(lambda layer, _: passes.append(layers[layer]))
        hidden = completion_hidden_states(model, Sequences(IDS, REAL, SCORED))
        token_terms(hidden, output_head(model), IDS[SCORED]).student_logprobs.sum().backward()
    recomputed = {True: list(layers.values()), "selective": list(layers.values())[::2]}.get(checkpointing, [])
    assert len(layers) > 2
    assert sorted(passes) == sorted([*layers.values(), *recomputed])


@pytest.mark.parametrize(("alpha", "scale"), [(4.0, 2.0), (1.5, 0.75), (0.5, 0.25)])
def test_the_adapters_scale_is_alpha_over_rank(alpha, scale):
    config = ModelConfig(finetune="lora", lora_rank=2, lora_alpha=alpha)
    policy = make_policy(base(), config, TeacherConfig())
    scales = {m.scaling["student"] for m in policy.modules() if isinstance(getattr(m, "scaling", None), dict)}
    assert scales == {scale}


def test_copies_compute_with_the_kernels_of_the_student():
    config = ModelConfig(path="tiny", layer_kernels="compiled")
    policy = make_policy(load_base(config), config, TeacherConfig("ema"), needs_reference=True)
    compiled = [[layer._compiled_call_impl is not None for layer in model.model.layers] for model in policy.models()]
    assert compiled == [[True] * len(policy.student.model.layers)] * 3

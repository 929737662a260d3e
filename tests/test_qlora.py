"""An adapter on a 4-bit base, on the CPU path of bitsandbytes."""

import pytest
import torch
from examples import small_qwen

from pmd.batch import Sequences
from pmd.config.schema import ModelConfig, TeacherConfig
from pmd.losses.distillation import TeacherPart
from pmd.losses.fused import token_terms
from pmd.policy import Policy, make_policy
from pmd.pretrained import load_base
from pmd.scoring import completion_hidden_states, output_head

pytest.importorskip("bitsandbytes")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
REAL, SCORED = torch.ones_like(IDS), torch.arange(8)[None] >= 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 32}
    small_qwen(64, tie_word_embeddings=False, **shape).save_pretrained(folder)
    return folder


def policy_of(checkpoint, kind: str = "frozen") -> Policy:
    config = ModelConfig(path=str(checkpoint), dtype="bfloat16", finetune="qlora", lora_rank=4)
    torch.manual_seed(1)
    return make_policy(load_base(config), config, TeacherConfig(kind=kind, ema_rate=0.5))


def hidden_of(policy: Policy, role) -> torch.Tensor:
    with torch.no_grad(), policy.weights(role) as model:
        return completion_hidden_states(model, Sequences(IDS, REAL, SCORED)).float()


def test_the_base_is_packed_to_four_bits_and_only_the_adapter_is_trained(checkpoint):
    policy = policy_of(checkpoint)
    trained = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all(".student." in name and p.dtype == torch.float32 for name, p in trained)
    packed = [p for name, p in policy.named_parameters() if "base_layer" in name and p.dtype == torch.uint8]
    assert len(packed) == 2 * 7  # every linear layer of both blocks


def test_what_is_not_packed_keeps_its_dtype(checkpoint):
    """Norms, embedding and head: in float32, the head would be twice as large and its products many times slower."""
    policy = policy_of(checkpoint)
    with policy.weights("student") as model:
        assert output_head(model).shape == (64, 64)
    base = {p.dtype for name, p in policy.named_parameters() if "lora_" not in name}
    assert base == {torch.uint8, torch.bfloat16}


@pytest.mark.parametrize("kind", ["frozen", "ema"])
def test_distillation_moves_the_student_and_the_teacher_as_its_kind_says(checkpoint, kind):
    policy = policy_of(checkpoint, kind)
    policy.train()
    before = hidden_of(policy, "reference")
    packed = {name: p.clone() for name, p in policy.named_parameters() if p.dtype == torch.uint8}
    for _ in range(3):
        with torch.no_grad(), policy.weights("teacher") as model:
            part = TeacherPart(
                completion_hidden_states(model, Sequences(IDS.flip(1), REAL, SCORED)), output_head(model), 1.0
            )
        with policy.weights("student") as model:
            hidden = completion_hidden_states(model, Sequences(IDS, REAL, SCORED))
            terms = token_terms(hidden, output_head(model), IDS[SCORED], [part], alpha="symmetric")
        terms.per_token_divergence.mean().backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.grad is not None:
                    assert torch.isfinite(parameter.grad).all()
                    parameter -= 5.0 * parameter.grad
                    parameter.grad = None
        policy.after_rollout_batch()
    assert not torch.equal(hidden_of(policy, "student"), before)
    assert torch.equal(hidden_of(policy, "reference"), before)
    assert torch.equal(hidden_of(policy, "teacher"), before) == (kind == "frozen")
    assert all(torch.equal(p, packed[name]) for name, p in policy.named_parameters() if name in packed)


def test_gradients_do_not_change_after_a_forward_pass_in_eval_mode(checkpoint):
    """A CPU with bf16 instructions repacks 4-bit weights in eval mode, after which gradients come out wrong."""

    def gradient(policy: Policy) -> torch.Tensor:
        with policy.weights("student") as model:
            hidden = completion_hidden_states(model, Sequences(IDS, REAL, SCORED))
            token_terms(hidden, output_head(model), IDS[SCORED]).student_logprobs.sum().backward()
        found = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        policy.zero_grad(set_to_none=True)
        return found

    policy = policy_of(checkpoint)
    policy.train()
    fresh = gradient(policy)
    hidden_of(policy, "teacher")
    policy.eval()
    hidden_of(policy, "student")
    policy.train()
    torch.testing.assert_close(gradient(policy), fresh)


def test_gradient_checkpointing_changes_no_gradient_and_is_not_reentrant(checkpoint, recwarn):
    found = []
    for checkpointing in (False, True):
        config = ModelConfig(
            path=str(checkpoint), dtype="bfloat16", finetune="qlora", lora_rank=4, gradient_checkpointing=checkpointing
        )
        torch.manual_seed(1)
        policy = make_policy(load_base(config), config, TeacherConfig())
        with policy.weights("student") as model:
            assert model.is_gradient_checkpointing == checkpointing
            hidden = completion_hidden_states(model, Sequences(IDS, REAL, SCORED))
            token_terms(hidden, output_head(model), IDS[SCORED]).student_logprobs.sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert not [w for w in recwarn if "use_reentrant" in str(w.message)]
    torch.testing.assert_close(found[1], found[0])

"""Chunked scores and their gradients against whole logits in float64; and that position t - 1 predicts token t."""

import jaxtyping
import pytest
import torch
from examples import small_qwen
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3ForCausalLM

from pmd.batch import Sequences
from pmd.errors import AlignmentError, ConfigError
from pmd.losses.distillation import TeacherPart, per_token_divergence
from pmd.scoring import IMPLEMENTATIONS, can_share_prefixes, completion_hidden_states, output_head

N, H, V = 11, 6, 50
ALPHAS = [0.0, 0.4, 1.0, "symmetric"]
SUPPORTS = [{}, {"top_k": 5}, {"top_k": 5, "tail": False}]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_model() -> Qwen3ForCausalLM:
    return small_qwen(V, tie_word_embeddings=False).double()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("head_is_trained", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_whole_logits(implementation, alpha, support, chunk, head_is_trained):
    token_terms = IMPLEMENTATIONS[implementation]
    hidden, head = draw(1, N, H).requires_grad_(), draw(2, V, H).requires_grad_(head_is_trained)
    teacher = [TeacherPart(draw(3, N, H + 2), draw(4, V, H + 2), 0.7), TeacherPart(draw(5, N, H), draw(6, V, H), 0.3)]
    targets = torch.arange(N) * 3 % V
    mix = draw(7, 2, N)  # a loss that uses both outputs
    terms = token_terms(hidden, head, targets, teacher, alpha=alpha, chunk_tokens=chunk, **support)
    loss = (terms.per_token_divergence * mix[0] + terms.student_logprobs * mix[1]).sum()
    wanted = [hidden, head] if head_is_trained else [hidden]
    ours = torch.autograd.grad(loss, wanted)

    student_logits = hidden @ head.T
    teacher_logits = sum(part.weight * (part.hidden @ part.head.T) for part in teacher)
    logprobs = student_logits.log_softmax(-1)
    divergence = per_token_divergence(logprobs, teacher_logits.log_softmax(-1), alpha=alpha, **support)
    sampled = logprobs.gather(-1, targets[:, None])[:, 0]
    theirs = torch.autograd.grad((divergence * mix[0] + sampled * mix[1]).sum(), wanted)

    torch.testing.assert_close(terms.per_token_divergence, divergence)
    torch.testing.assert_close(terms.student_logprobs, sampled)
    torch.testing.assert_close(terms.entropy, -(logprobs.exp() * logprobs).sum(-1).detach())
    torch.testing.assert_close(
        terms.teacher_logprobs, teacher_logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("token_terms", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_without_a_teacher_there_is_no_divergence(token_terms):
    terms = token_terms(draw(1, N, H), draw(2, V, H), torch.zeros(N, dtype=torch.long))
    assert terms.per_token_divergence is None
    assert terms.teacher_logprobs is None


@pytest.mark.parametrize("token_terms", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_no_gradient_reaches_the_teacher(token_terms):
    hidden, head = draw(3, N, H).requires_grad_(), draw(4, V, H).requires_grad_()
    student = draw(1, N, H).requires_grad_()
    terms = token_terms(student, draw(2, V, H), torch.zeros(N, dtype=torch.long), [TeacherPart(hidden, head, 1.0)])
    terms.per_token_divergence.sum().backward()
    assert hidden.grad is None
    assert head.grad is None
    assert student.grad.abs().sum() > 0


def test_a_token_is_predicted_by_the_state_before_it():
    """Changing token t must leave its own prediction alone and change the next one's."""
    model = small_model()
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    real, scored = torch.ones_like(ids), torch.tensor([[False, False, False, True, True, True]])
    before = completion_hidden_states(model, Sequences(ids, real, scored))
    changed = ids.clone()
    changed[0, 4] = 7
    after = completion_hidden_states(model, Sequences(changed, real, scored))
    assert before.shape == (3, 16)
    assert torch.equal(before[:2], after[:2])  # tokens 3 and 4 stand before the change
    assert not torch.allclose(before[2], after[2])


def test_equals_the_models_own_logits():
    model = small_model()
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    scored = torch.tensor([[False, False, True, True, True, True]])
    hidden = completion_hidden_states(model, Sequences(ids, torch.ones_like(ids), scored))
    terms = IMPLEMENTATIONS["fused"](hidden, output_head(model), ids[scored])
    logprobs = model(ids).logits.log_softmax(-1)
    expected = [logprobs[0, t - 1, ids[0, t]].item() for t in range(2, 6)]
    assert terms.student_logprobs.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(left):
    model = small_model()
    ids, pad = torch.tensor([[4, 8, 15, 16, 23]]), torch.zeros(1, 3, dtype=torch.long)
    real, scored = torch.ones_like(ids), torch.tensor([[False, False, True, True, True]])
    plain = completion_hidden_states(model, Sequences(ids, real, scored))
    order = (lambda a, b: torch.cat([b, a], 1)) if left else (lambda a, b: torch.cat([a, b], 1))
    padded = completion_hidden_states(model, Sequences(order(ids, pad), order(real, pad), order(scored, pad.bool())))
    torch.testing.assert_close(padded, plain, rtol=1e-9, atol=1e-11)


def test_padding_cannot_be_scored():
    model, ids = small_model(), torch.tensor([[4, 8, 15]])
    with pytest.raises(AlignmentError):
        completion_hidden_states(model, Sequences(ids, torch.tensor([[1, 1, 0]]), torch.tensor([[False, False, True]])))
    with pytest.raises(AlignmentError):
        completion_hidden_states(model, Sequences(ids, torch.ones_like(ids), torch.tensor([[True, False, False]])))


@pytest.mark.parametrize("token_terms", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_what_does_not_match_is_refused(token_terms):
    hidden, head, targets = draw(1, N, H), draw(2, V, H), torch.zeros(N, dtype=torch.long)
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):  # the latter where shapes are checked, as in this suite
        token_terms(hidden, head, targets[1:])
    with pytest.raises(ValueError, match="10 hidden states of the teacher for 11"):
        token_terms(hidden, head, targets, [TeacherPart(hidden[1:], head, 1.0)])
    with pytest.raises(ValueError, match="a teacher of 49 tokens for a student of 50"):
        token_terms(hidden, head, targets, [TeacherPart(hidden, head[1:], 1.0)])


@pytest.mark.parametrize(
    ("setting", "neutral", "other"),
    [
        ("final_logit_softcapping", None, 30.0), ("logits_soft_cap", None, 30.0), ("logit_scale", 1.0, 0.0625),
        ("logits_scaling", 1.0, 8.0), ("lm_head_multiplier", 1.0, 2.0),
    ],
)  # fmt: skip
def test_settings_that_change_the_logits_are_refused(setting, neutral, other):
    model = small_model()
    setattr(model.config, setting, neutral)
    assert output_head(model).shape == (V, 16)
    setattr(model.config, setting, other)
    with pytest.raises(ConfigError, match=f"{setting}={other}, which changes its logits"):
        output_head(model)


def test_a_model_that_names_no_kinds_of_layers_has_full_attention():
    config = LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    assert not hasattr(config, "layer_types")
    assert can_share_prefixes(LlamaForCausalLM(config).eval())

"""Turns token ids into per-token terms: the one scoring path of training, audits, parity check and notebook.

    sequences --backbone--> hidden states [N, H] of the N completion tokens --head, losses/--> per-token terms [N]

This is the one place where positions shift by one: the state before a token predicts it. No tensor of shape [B, L, V]
is ever created. Padded rows, packed rows and shared prompts give the same states.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from pmd import attention
from pmd.batch import Sequences, SharedPrefixes, pad_sequences, split_by_tokens
from pmd.config.schema import ObjectiveConfig
from pmd.errors import AlignmentError, ConfigError
from pmd.losses import distillation, fused
from pmd.losses.distillation import TeacherPart, TokenTerms
from pmd.packing import PackedSequences
from pmd.policy import Policy, eval_mode
from pmd.sharding import backbone_of, class_of, whole
from pmd.types import PromptAndCompletion, Role

#: The objective that `score` uses by default.
DEFAULTS = ObjectiveConfig()
IMPLEMENTATIONS = {"reference": distillation.token_terms, "fused": fused.token_terms}
#: Settings with which some architectures scale or cap their logits, and the value that leaves them unchanged.
LOGIT_SETTINGS = {
    "final_logit_softcapping": None,  # Gemma 2
    "logits_soft_cap": None,  # RecurrentGemma
    "logit_scale": 1.0,  # Cohere
    "logits_scaling": 1.0,  # Granite
    "lm_head_multiplier": 1.0,  # Falcon-H1
}


def score(
    policy: Policy,
    sequences: Sequences | PackedSequences,
    role: Role = "student",
    *,
    teacher: Sequence[TeacherPart] = (),
    reference: Sequence[TeacherPart] = (),
    objective: ObjectiveConfig = DEFAULTS,
) -> TokenTerms:
    """Score every completion token under `role`, and compare with teacher and reference policy if they are given.

    With gradients enabled, the model runs in training mode, with any dropout and gradient checkpointing; otherwise it
    runs in eval mode.
    """
    token_terms = IMPLEMENTATIONS[objective.implementation]
    with policy.weights(role) as model, nullcontext() if torch.is_grad_enabled() else eval_mode(model):
        hidden, head, targets = completion_hidden_states(model, sequences), output_head(model), sequences.completion_ids
        terms = token_terms(
            hidden, head, targets, teacher, alpha=objective.alpha, top_k=objective.top_k, tail=objective.tail
        )
        if reference:  # KL(student || reference): the reverse divergence over the whole vocabulary
            kl = token_terms(hidden, head, targets, reference, alpha=1.0).per_token_divergence
            terms = replace(terms, per_token_reference_kl=kl)
    return terms


@torch.no_grad()
def teacher_part(
    policy: Policy, role: Role, sequences: Sequences | PackedSequences, weight: float = 1.0
) -> TeacherPart:
    """Return the hidden states of `role` for `score` to compare with; no dropout, even if `role` is the student."""
    with policy.weights(role) as model, eval_mode(model):
        return TeacherPart(completion_hidden_states(model, sequences), output_head(model), weight)


class PolicyScorer:
    """Scores (prompt, completion) pairs with the training weights, in micro-batches of bounded size. No gradient."""

    def __init__(self, policy: Policy, pad_id: int, max_tokens: int):
        self.policy, self.pad_id, self.max_tokens = policy, pad_id, max_tokens

    @torch.no_grad()
    def __call__(self, pairs: Sequence[PromptAndCompletion], role: Role) -> list[list[float]]:
        """Return the log-probs of each completion's tokens; a trust-region teacher scores as the reference policy."""
        scores: list[list[float]] = [[] for _ in pairs]
        device = next(self.policy.parameters()).device
        for rows in split_by_tokens([len(prompt) + len(ids) for prompt, ids in pairs], self.max_tokens):
            sequences = pad_sequences([pairs[row] for row in rows], self.pad_id, device)
            terms = score(self.policy, sequences, role)
            parts = torch.split(terms.student_logprobs.cpu(), [len(pairs[row][1]) for row in rows])
            for row, part in zip(rows, parts, strict=True):
                scores[row] = part.tolist()
        return scores


def completion_hidden_states(model: PreTrainedModel, sequences: Sequences | PackedSequences) -> Float[Tensor, "N H"]:
    """Return the final hidden states that predict each completion token, [N, H], row after row.

    Shared prefixes are computed once. Padded rows are computed pass by pass, packed ones in a single pass.

    Raises:
        AlignmentError: a token to be scored is padding, or has no real token before it.
    """
    if isinstance(sequences, PackedSequences):
        return packed_states(model, sequences)
    real = sequences.attention_mask.bool()
    predictable = real & real.roll(1, dims=1)
    predictable[:, 0] = False
    if (sequences.completion_mask & ~predictable).any():
        raise AlignmentError("completion_mask marks padding, or a token that no real token precedes.")
    forward = backbone(model)
    kept = None if sequences.prefixes is None else KeptPrefixes(forward, sequences.prefixes)
    states = []
    for rows, columns in sequences.passes:
        ids, mask = sequences.input_ids[rows, columns], sequences.attention_mask[rows, columns]
        hidden = kept.states(rows, ids, mask) if kept else _whole_states(forward, ids, mask)  # [rows, columns, H]
        states.append(hidden[:, :-1][sequences.completion_mask[rows, columns][:, 1:]])
    return torch.cat(states)


def _whole_states(forward: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return forward(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state


def backbone(model: PreTrainedModel) -> Callable[..., Any]:
    """Return the part of a causal LM that ends before the output head, adapters included."""
    return backbone_of(_unwrap(model))


def output_head(model: PreTrainedModel) -> Float[Tensor, "V H"]:
    """Return the output head's weight [V, H]; if it is divided among ranks, all of them must ask for it.

    Raises:
        ConfigError: the logits are not just the hidden states times a weight, which is all that is supported.
    """
    inner = _unwrap(model)
    name, head = class_of(inner).__name__, cast(torch.nn.Linear, inner.get_output_embeddings())
    problems = []
    if class_of(head) is not torch.nn.Linear:
        problems.append(
            f"model: the output head of {name} is a {class_of(head).__name__}, not a plain linear layer; "
            "leave it out of LoRA's target modules and of quantisation."
        )
    elif head.bias is not None:
        problems.append(f"model: the output head of {name} has a bias, which is not supported; use another model.")
    problems += describe_logit_settings(inner.config, name)
    if problems:
        raise ConfigError(problems)
    return whole(head.weight)


def describe_logit_settings(architecture: PretrainedConfig, name: str) -> list[str]:
    """Return a sentence for each setting with which the logits are more than hidden states times a weight."""
    settings = architecture.get_text_config().to_dict()
    return [
        f"model: {name} has {setting}={settings[setting]}, which changes its logits and is not supported; "
        "use another model."
        for setting, neutral in LOGIT_SETTINGS.items()
        if settings.get(setting, neutral) not in (neutral, None)
    ]


def packs_rows(model: PreTrainedModel) -> bool:
    """Whether rows are packed under the model's attention implementation (`model.attention`)."""
    return shares_packed_prefixes(model) or is_flash_attention_requested(model.config)


def shares_packed_prefixes(model: PreTrainedModel) -> bool:
    """Whether packed rows may share prefixes: with our attention they may, whatever the layers and checkpointing."""
    return model.config._attn_implementation == attention.NAME


def packed_states(model: PreTrainedModel, sequences: PackedSequences) -> Float[Tensor, "N H"]:
    """Return what `completion_hidden_states` returns, for packed rows.

    Flash attention as transformers calls it tells rows apart by their positions, which restart with each; it cannot
    share prefixes. Other implementations build a full quadratic mask of the rows, which is correct but slow.
    """
    forward, ids, layout = backbone(model), sequences.input_ids[None], sequences.layout
    if shares_packed_prefixes(model):
        mask = ids.new_ones(1, 1, 1, 1)  # transformers leaves four dimensions alone, and the layout says it all
        hidden = forward(
            input_ids=ids,
            attention_mask=mask,
            position_ids=sequences.position_ids[None],
            use_cache=False,
            packed_layout=layout,
        ).last_hidden_state[0]  # [T, H]
    else:
        assert layout.shared is None
        hidden = forward(input_ids=ids, position_ids=sequences.position_ids[None], use_cache=False).last_hidden_state[0]
    return hidden.index_select(0, sequences.predicts)


def can_share_prefixes(model: PreTrainedModel) -> bool:
    """Whether all layers use full attention and gradient checkpointing does not rule out a cache."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not (model.training and model.is_gradient_checkpointing)


class KeptPrefixes:
    """Keys and values of shared prefixes, which rows continue from; gradients flow through them."""

    def __init__(self, backbone: Callable[..., Any], prefixes: SharedPrefixes):
        """Compute the prefixes [P, W], padded on the left, in one pass."""
        real = prefixes.attention_mask
        positions = (real.cumsum(1) - 1).clamp(min=0)
        self.cache = backbone(
            input_ids=prefixes.input_ids, attention_mask=real, position_ids=positions, use_cache=True
        ).past_key_values
        self.backbone, self.prefixes = backbone, prefixes

    def states(self, rows: slice, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the final hidden states [B, L, H] of the batch's `rows`, padded on the right."""
        of_row = self.prefixes.of_row[rows]
        before = self.prefixes.attention_mask[of_row]
        kept = ((layer.keys[of_row], layer.values[of_row]) for layer in self.cache.layers)
        return self.backbone(
            input_ids=input_ids,
            attention_mask=torch.cat([before, attention_mask], dim=1),
            position_ids=before.sum(1, keepdim=True) + torch.arange(input_ids.shape[1], device=input_ids.device),
            past_key_values=DynamicCache(kept),
            use_cache=True,
        ).last_hidden_state


def _unwrap(model: PreTrainedModel) -> PreTrainedModel:
    """Return the causal LM inside a PEFT wrapper; its layers keep their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]

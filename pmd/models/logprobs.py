"""Log-probs, entropy and divergence of completion tokens from hidden states. Nothing of shape [B, L, V] ever exists.

Enters: a causal LM and right- or left-padded sequences; then hidden states [N, H] of N completion tokens and an output
head [V, H]. Leaves: per-token values [N]. Logits exist for `chunk_tokens` tokens at a time and are computed again in
the backward pass. This is the one place where positions shift by one: the state before a token predicts it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pmd.objective.divergence import Alpha, divergence_from_logprobs, on_support

CHUNK_ELEMENTS = 64 * 1024 * 1024  # logits that exist at once, per policy: 256 MB in float32


@dataclass(frozen=True, slots=True)
class TeacherPart:
    """One policy that scores the completion; the teacher's logits are the weighted sum over its parts."""

    hidden: Tensor  # [N, H]
    head: Tensor  # [V, H]
    weight: float


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """Per completion token, rollout after rollout; all [N], float32."""

    student_logprobs: Tensor  # of the sampled token; carries the gradient
    entropy: Tensor  # of the student; no gradient
    per_token_divergence: Tensor | None  # to the teacher; carries the gradient; None without a teacher
    teacher_logprobs: Tensor | None  # of the sampled token; no gradient


def completion_hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> Tensor:
    """Return the final hidden states that predict each completion token, [N, H], row after row.

    Args:
        input_ids: [B, L] prompt and completion, padded on either side.
        attention_mask: [B, L], 1 where a token is real.
        completion_mask: [B, L] bool, the tokens to be scored; never the first of a row.
    """
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    hidden = backbone(model)(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state  # [B, L, H]
    return hidden[:, :-1][completion_mask[:, 1:]]


def backbone(model: PreTrainedModel) -> torch.nn.Module:
    """Return the part of a causal LM that ends before the output head, adapters included."""
    inner = _unwrap(model)
    return getattr(inner, inner.base_model_prefix)


def output_head(model: PreTrainedModel) -> Tensor:
    """Return the output head's weight [V, H].

    Raises:
        NotImplementedError: the head has a bias or caps its logits, which this file does not compute.
    """
    inner = _unwrap(model)
    head = cast(torch.nn.Linear, inner.get_output_embeddings())
    softcap = inner.config.to_dict().get("final_logit_softcapping")
    if getattr(head, "bias", None) is not None or softcap:
        raise NotImplementedError(
            f"{type(inner).__name__}: output heads with a bias or capped logits are not supported"
        )
    return head.weight


def token_terms(
    student_hidden: Tensor,
    student_head: Tensor,
    target_ids: Tensor,
    teacher: Sequence[TeacherPart] = (),
    *,
    alpha: Alpha = 1.0,
    top_k: int | None = None,
    tail: bool = True,
) -> TokenTerms:
    """Score N completion tokens [N] from student hidden states [N, H], in chunks, against the teacher if there is one.

    Heads may differ between student and teacher, and in size of H; V must be the same.
    """
    chunk = max(1, CHUNK_ELEMENTS // student_head.shape[0])
    columns: list[tuple[Tensor, ...]] = []
    for start in range(0, len(target_ids), chunk):
        rows = slice(start, start + chunk)
        parts = [TeacherPart(part.hidden[rows], part.head, part.weight) for part in teacher]
        terms = checkpoint(
            _chunk_terms,
            student_hidden[rows], student_head, target_ids[rows], parts, alpha, top_k, tail,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        columns.append(cast(tuple[Tensor, ...], terms))
    student_logprobs, entropy, *rest = (torch.cat(column) for column in zip(*columns, strict=True))
    divergence, teacher_logprobs = rest if rest else (None, None)
    return TokenTerms(student_logprobs, entropy, divergence, teacher_logprobs)


def _chunk_terms(
    hidden: Tensor,
    head: Tensor,
    target_ids: Tensor,
    teacher: Sequence[TeacherPart],
    alpha: Alpha,
    top_k: int | None,
    tail: bool,
) -> tuple[Tensor, ...]:
    """Score one chunk: (student log-probs, entropy) or (student log-probs, entropy, divergence, teacher log-probs)."""
    student = _log_softmax(hidden, head)  # [n, V]
    student_logprobs = student.gather(-1, target_ids[:, None])[:, 0]
    entropy = -(student.detach().exp() * student.detach()).sum(-1)
    if not teacher:
        return student_logprobs, entropy
    with torch.no_grad():
        logits = sum(part.weight * (part.hidden @ part.head.T).float() for part in teacher)
        reference = cast(Tensor, logits).log_softmax(-1)
        teacher_logprobs = reference.gather(-1, target_ids[:, None])[:, 0]
    if top_k is not None and top_k < student.shape[-1]:
        support = student.detach().topk(top_k, dim=-1).indices
        student = on_support(student.gather(-1, support), tail=tail)
        reference = on_support(reference.gather(-1, support), tail=tail)
    return student_logprobs, entropy, divergence_from_logprobs(student, reference, alpha), teacher_logprobs


def _log_softmax(hidden: Tensor, head: Tensor) -> Tensor:
    logits = hidden @ head.T
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _unwrap(model: PreTrainedModel) -> PreTrainedModel:
    """Return the causal LM inside a PEFT wrapper; its layers keep their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]

"""How far the student is from its memory-conditioned teacher, token by token, in nats. The reference implementation.

    alpha = 0           KL(T || S), forward: mode-covering
    alpha = 1           KL(S || T), reverse: mode-seeking
    0 < alpha < 1       (1 - alpha) KL(S || M) + alpha KL(T || M),  M = (1 - alpha) S + alpha T
    alpha = "symmetric" (KL(T || S) + KL(S || T)) / 2

The first three follow SDPO's release and TRL's SDPO loss; the symmetric KL is our choice. With `top_k`, the two are
compared on the student's k most likely tokens, and the rest of the mass is one tail bucket. Only the student gets
gradients. `fused.py` computes the same numbers faster; `objective.implementation` chooses between the two.

Deviation: the release and TRL compute the tail as log(1 - sum p), which in float32 cannot resolve a tail below 1e-7;
here it is the logsumexp of the tokens outside the support, exact however small. The two agree where both can be
computed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Alpha = float | Literal["symmetric"]
#: Elements of one tensor [chunk, V]; 224 MB in float32 on a CPU, more on a GPU, whose matrix products need more rows.
CHUNK_ELEMENTS = {"cpu": 56 * 2**20, "cuda": 64 * 2**20}
CHUNK_MULTIPLE = 16  # a matrix product of 320 rows takes less time than one of 331
#: With Triton kernels: bytes of the student's logits that exist at once, and how much of the vocabulary the teacher's
#: logits cover at a time. A product with fewer than 1,024 rows would leave half of a large GPU idle.
KERNEL_CHUNK_BYTES, SLAB_TOKENS = 640_000_000, 16_384
KERNEL_CHUNK_MULTIPLE = 128


@dataclass(frozen=True, slots=True)
class TeacherPart:
    """One policy that scores the completion; the teacher's logits are the weighted sum over its parts."""

    hidden: Tensor  # [N, H]
    head: Tensor  # [V, H]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """Per-token results, rollout after rollout; all [N], float32 (float64 if the hidden states are)."""

    student_logprobs: Tensor  # of the sampled token; carries the gradient
    entropy: Tensor  # of the student; no gradient
    per_token_divergence: Tensor | None = None  # from the teacher; carries the gradient; None without a teacher
    teacher_logprobs: Tensor | None = None  # of the sampled token; no gradient
    per_token_reference_kl: Tensor | None = None  # KL(student || reference); carries the gradient; None if not asked


def token_terms(
    student_hidden: Float[Tensor, "N H"],
    student_head: Float[Tensor, "V H"],
    target_ids: Int[Tensor, " N"],
    teacher: Sequence[TeacherPart] = (),
    *,
    alpha: Alpha = 1.0,
    top_k: int | None = None,
    tail: bool = True,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> TokenTerms:
    """Score N completion tokens, and compare with the teacher if there is one.

    Logits exist for one chunk of tokens at a time, in the backward pass too. They are computed in the head's dtype,
    everything after them in float32 at least. Teacher and student may differ in H and in dtype, not in V.

    Args:
        alpha: in [0, 1], or "symmetric"; see the module's table.
        top_k: size of the support, the student's most likely tokens; None, or at least V, is the whole vocabulary.
        tail: with top_k, add one bucket for the mass outside the support; False renormalises inside it.
        temperature: divides the logits of both policies.
        chunk_tokens: how many tokens' logits exist at once; None uses `chunk_size`.

    Raises:
        ValueError: alpha, top_k or temperature out of range; student, targets and teacher do not match.
    """
    check_comparison(alpha, top_k, temperature)
    check_aligned(student_hidden, student_head, target_ids, teacher)

    def chunk_terms(hidden: Tensor, head: Tensor, targets: Tensor, *teacher_hidden: Tensor) -> tuple[Tensor, ...]:
        student = logprobs(hidden, head, temperature)  # [n, V]
        terms = [student.gather(-1, targets[:, None])[:, 0], torch.special.entr(student.detach().exp()).sum(-1)]
        if teacher:
            with torch.no_grad():
                parts = (p.weight * _logits(h, p.head) for h, p in zip(teacher_hidden, teacher, strict=True))
                compared = (sum(parts, hidden.new_zeros(())) / temperature).log_softmax(-1)  # [n, V]
            terms += [per_token_divergence(student, compared, alpha, top_k, tail)]
            terms += [compared.gather(-1, targets[:, None])[:, 0]]
        return tuple(terms)

    size = chunk_tokens or chunk_size(student_hidden.device.type, len(student_head))
    sliced = zip(*(t.split(size) for t in (student_hidden, target_ids, *(p.hidden for p in teacher))), strict=True)
    with torch.autocast(student_hidden.device.type, enabled=False):
        chunks = [
            checkpoint(
                chunk_terms,
                hidden,
                student_head,
                targets,
                *teacher_hidden,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for hidden, targets, *teacher_hidden in sliced
        ]
    return TokenTerms(*(torch.cat(columns) for columns in zip(*chunks, strict=True)))


def per_token_divergence(
    student: Float[Tensor, "*N V"],
    teacher: Float[Tensor, "*N V"],
    alpha: Alpha,
    top_k: int | None = None,
    tail: bool = True,
) -> Float[Tensor, "*N"]:
    """Return the divergence of two log-distributions over the last axis; only `student` gets a gradient.

    Raises:
        ValueError: alpha or top_k out of range.
    """
    check_comparison(alpha, top_k)
    teacher = teacher.detach()
    if top_k is not None and top_k < student.shape[-1]:
        support = student.detach().topk(top_k, dim=-1, sorted=False).indices
        student, teacher = on_support(student, support, tail), on_support(teacher, support, tail)
    if alpha == "symmetric":
        return (kl(teacher, student) + kl(student, teacher)) / 2
    if alpha == 0.0:
        return kl(teacher, student)
    if alpha == 1.0:
        return kl(student, teacher)
    possible = (student > -torch.inf) | (teacher > -torch.inf)  # elsewhere logaddexp has a NaN gradient
    parts = student + math.log1p(-alpha), teacher + math.log(alpha)
    mixture = torch.logaddexp(*(torch.where(possible, part, 0.0) for part in parts))
    return (1.0 - alpha) * kl(student, mixture) + alpha * kl(teacher, mixture)


def kl(p: Float[Tensor, "*N V"], q: Float[Tensor, "*N V"]) -> Float[Tensor, "*N"]:
    """Return KL(p || q) = sum_j p_j (log p_j - log q_j) of log-distributions, with 0 log 0 = 0.

    Infinite if q is 0 where p is not. Where both are 0, neither the value nor the gradient is NaN.
    """
    return (p.exp() * torch.where(p > -torch.inf, p - q, 0.0)).sum(-1)


def on_support(logprobs: Float[Tensor, "*N V"], support: Int[Tensor, "*N K"], tail: bool) -> Float[Tensor, "*N _"]:
    """Reduce log-probs to the support: with the mass of all other tokens appended [K + 1], or renormalised [K]."""
    inside = logprobs.gather(-1, support)
    if not tail:
        return inside - inside.logsumexp(-1, keepdim=True)
    outside = logprobs.scatter(-1, support, -torch.inf)
    possible = outside.detach().amax(-1, keepdim=True) > -torch.inf
    # logsumexp over only -inf has a NaN gradient, which the first `where` keeps out of the graph.
    rest = torch.where(possible, outside, 0.0).logsumexp(-1, keepdim=True)
    return torch.cat([inside, torch.where(possible, rest, -torch.inf)], dim=-1)


def logprobs(
    hidden: Float[Tensor, "N H"], head: Float[Tensor, "V H"], temperature: float = 1.0
) -> Float[Tensor, "N V"]:
    """Return the log-probs of the whole vocabulary, float32 at least."""
    return (_logits(hidden, head) / temperature).log_softmax(-1)


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    return at_least_float32(hidden.to(head.dtype) @ head.T)


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64 alone."""
    return values if values.dtype == torch.float64 else values.float()


def chunk_size(device_type: str, vocabulary: int) -> int:
    """Return how many tokens' logits exist at once."""
    size = CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"]) // vocabulary
    return size // CHUNK_MULTIPLE * CHUNK_MULTIPLE or max(1, size)


def kernel_chunk_size(vocabulary: int, logit_bytes: int = 4) -> int:
    """Return how many tokens' logits exist at once where Triton kernels work on them."""
    size = KERNEL_CHUNK_BYTES // (vocabulary * logit_bytes)
    return size // KERNEL_CHUNK_MULTIPLE * KERNEL_CHUNK_MULTIPLE or max(1, size)


def check_comparison(alpha: Alpha, top_k: int | None, temperature: float = 1.0) -> None:
    """Check that the settings of the comparison are in range.

    Raises:
        ValueError: alpha, top_k or temperature out of range.
    """
    if alpha != "symmetric" and not (isinstance(alpha, int | float) and 0.0 <= alpha <= 1.0):
        raise ValueError(f'alpha={alpha} must lie in [0, 1] or be "symmetric"')
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None for the whole vocabulary")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0")


def check_aligned(hidden: Tensor, head: Tensor, target_ids: Tensor, teacher: Sequence[TeacherPart]) -> None:
    """Check that student, targets and teacher share the same tokens and vocabulary.

    Raises:
        ValueError: student, targets and teacher do not match.
    """
    for whose, states in [("student", hidden), *(("teacher", part.hidden) for part in teacher)]:
        if len(states) != len(target_ids):
            raise ValueError(f"{len(states)} hidden states of the {whose} for {len(target_ids)} completion tokens")
    for part in teacher:
        if len(part.head) != len(head):
            raise ValueError(f"a teacher of {len(part.head)} tokens for a student of {len(head)}")


@dataclass(frozen=True, slots=True)
class ImportanceWeights:
    """Corrects for tokens sampled with other weights, or with other arithmetic. No gradient."""

    old_logprobs: Float[Tensor, " N"]  # of the sampling policy, as far as known
    tis: Float[Tensor, " N"]  # min(old / engine, cap); 0 where the engine reported nothing
    known: Bool[Tensor, " N"]


def importance_weights(
    student_logprobs: Float[Tensor, " N"],
    sampling_logprobs: Float[Tensor, " N"],
    on_policy: Bool[Tensor, " N"],
    tis_cap: float | None,
) -> ImportanceWeights:
    """Compare the student with the policy and engine that sampled.

    Two gaps are corrected. The policy may have moved since it sampled: `policy_ratio`, student / old policy. And the
    engine's arithmetic differs from the trainer's: `tis`, old policy / engine (truncated importance sampling). For
    tokens sampled with the current weights, the old policy's log-probs are the student's own. For all others, the
    engine's are used instead, and one ratio covers both gaps (our choice: it needs no extra forward pass).

    Args:
        sampling_logprobs: the engine's; NaN where it reported none. Such a token is dropped, not taken as certain.
        on_policy: tokens sampled with the current weights.
        tis_cap: cap on old / engine; None turns the correction off.
    """
    student, sampling = student_logprobs.detach(), sampling_logprobs.detach()
    known = ~sampling.isnan()
    # A dropped token gets the student's own log-prob, so every ratio is 1 and finite; its weight of 0 removes it.
    sampling = torch.where(known, sampling, student)
    old = torch.where(on_policy, student, sampling)
    weight = torch.ones_like(old) if tis_cap is None else (old - sampling).exp().clamp(max=tis_cap)
    return ImportanceWeights(old, torch.where(known, weight, 0.0), known)


def policy_ratio(
    student_logprobs: Float[Tensor, " N"], old_logprobs: Float[Tensor, " N"], cap: float | None
) -> Float[Tensor, " N"]:
    """Return min(student / old, cap) without gradient (SDPO's clip); ones if the cap is None."""
    if cap is None:
        return torch.ones_like(old_logprobs)
    return (student_logprobs.detach() - old_logprobs.detach()).exp().clamp(max=cap)

"""Per-token divergence between student and memory-conditioned teacher, in nats.

    alpha = 0           KL(T || S), forward: covers everything the teacher allows
    alpha = 1           KL(S || T), reverse: settles on what the teacher prefers
    0 < alpha < 1       (1 - alpha) KL(S || M) + alpha KL(T || M),  M = (1 - alpha) S + alpha T
    alpha = "symmetric" (KL(T || S) + KL(S || T)) / 2

The first three agree with SDPO's release and with TRL's implementation of it; the symmetric KL is our choice. The
support is the student's top-k, the teacher's log-probs are gathered at the same ids, and the rest of the mass is one
tail bucket. The teacher and the choice of support are detached: gradients reach the student's log-probs alone.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Alpha = float | Literal["symmetric"]


def per_token_divergence(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    *,
    alpha: Alpha,
    top_k: int | None = None,
    tail: bool = True,
) -> Float[Tensor, "B T"]:
    """Return the divergence at every token, from whole logits.

    Args:
        alpha: in [0, 1], or "symmetric"; see the module's table.
        top_k: size of the support, the student's likeliest tokens; None, or at least V, is the whole vocabulary.
        tail: with top_k, add one bucket for the mass outside the support; False renormalises inside it.

    Raises:
        ValueError: alpha or top_k out of range.
    """
    _check(alpha, top_k)
    student = _at_least_float32(student_logits).log_softmax(-1)
    teacher = _at_least_float32(teacher_logits).detach().log_softmax(-1)
    if top_k is not None and top_k < student.shape[-1]:
        support = student.detach().topk(top_k, dim=-1).indices
        student = on_support(student.gather(-1, support), tail=tail)
        teacher = on_support(teacher.gather(-1, support), tail=tail)
    return divergence_from_logprobs(student, teacher, alpha)


def on_support(logprobs: Float[Tensor, "... K"], *, tail: bool) -> Float[Tensor, "... _K"]:
    """Turn true log-probs on a support into a distribution: with a tail bucket [K + 1], or renormalised [K]."""
    if not tail:
        return logprobs - logprobs.logsumexp(-1, keepdim=True)
    mass = logprobs.exp().sum(-1, keepdim=True)
    tiny = torch.finfo(logprobs.dtype).eps
    # log(1 - p) where p rounds to 1 would be -inf with an infinite slope; such a tail is held at eps.
    rest = (1.0 - mass).clamp_min(tiny).log()
    return torch.cat([logprobs, rest], dim=-1)


def divergence_from_logprobs(
    student: Float[Tensor, "... V"], teacher: Float[Tensor, "... V"], alpha: Alpha
) -> Float[Tensor, "..."]:
    """Return the divergence of two log-distributions over the last axis. -inf (an impossible token) is allowed."""
    teacher = teacher.detach()
    if alpha == "symmetric":
        return 0.5 * (_kl(teacher, student) + _kl(student, teacher))
    if alpha == 0.0:
        return _kl(teacher, student)
    if alpha == 1.0:
        return _kl(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-alpha), teacher + math.log(alpha))
    return (1.0 - alpha) * _kl(student, mixture) + alpha * _kl(teacher, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) = sum p (log p - log q), with 0 log 0 = 0; infinite where q forbids what p allows."""
    possible = p > -torch.inf
    difference = torch.where(possible, p, 0.0) - torch.where(possible, q, 0.0)
    return (torch.where(possible, p, -torch.inf).exp() * difference).sum(-1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check(alpha: Alpha, top_k: int | None) -> None:
    if alpha != "symmetric" and not 0.0 <= alpha <= 1.0:
        raise ValueError(f'alpha={alpha} must lie in [0, 1] or be "symmetric"')
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None for the whole vocabulary")

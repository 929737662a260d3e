"""Per-token divergence between student and memory-conditioned teacher, in nats.

    alpha = 0           KL(T || S), forward: covers everything the teacher allows
    alpha = 1           KL(S || T), reverse: settles on what the teacher prefers
    0 < alpha < 1       (1 - alpha) KL(S || M) + alpha KL(T || M),  M = (1 - alpha) S + alpha T
    alpha = "symmetric" (KL(T || S) + KL(S || T)) / 2

The first three are the rule of SDPO's release and of TRL's SDPO loss; the symmetric KL is our choice. The support is
the student's top-k, the teacher's log-probs are gathered at the same ids, and the rest of the mass is one tail bucket.
The teacher and the choice of support are detached: gradients reach the student's log-probs alone.

Deviation: the release and TRL compute the tail as log(1 - sum p), which in float32 cannot see a tail below 1e-7; here
it is the logsumexp of the tokens outside the support, exact however small. The two agree where both can be computed.

An impossible token (log-prob -inf) is allowed: 0 log 0 = 0, and where the second distribution forbids what the first
allows the KL is infinite, as it should be. Its gradient is never NaN through a token that both forbid.
"""

import math
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

Alpha = float | Literal["symmetric"]


def per_token_divergence(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    *,
    alpha: Alpha,
    top_k: int | None = None,
    tail: bool = True,
) -> Float[Tensor, "B T"]:
    """Return the divergence at every token, from whole logits; float64 stays float64, less becomes float32.

    Args:
        alpha: in [0, 1], or "symmetric"; see the module's table.
        top_k: size of the support, the student's likeliest tokens; None, or at least V, is the whole vocabulary.
        tail: with top_k, add one bucket for the mass outside the support; False renormalises inside it.

    Raises:
        ValueError: alpha or top_k out of range.
    """
    check_divergence(alpha, top_k)
    student = at_least_float32(student_logits).log_softmax(-1)
    teacher = at_least_float32(teacher_logits).detach().log_softmax(-1)
    support = likeliest(student, top_k)
    if support is not None:
        student, teacher = on_support(student, support, tail=tail), on_support(teacher, support, tail=tail)
    return divergence_from_logprobs(student, teacher, alpha)


def check_divergence(alpha: Alpha, top_k: int | None) -> None:
    """Refuse what has no meaning.

    Raises:
        ValueError: alpha or top_k out of range.
    """
    if alpha != "symmetric" and not (isinstance(alpha, int | float) and 0.0 <= alpha <= 1.0):
        raise ValueError(f'alpha={alpha} must lie in [0, 1] or be "symmetric"')
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None for the whole vocabulary")


def at_least_float32(values: Tensor) -> Tensor:
    """Return half precision as float32, anything else as it is."""
    return values if values.dtype == torch.float64 else values.float()


def likeliest(student_logprobs: Float[Tensor, "*N V"], top_k: int | None) -> Int[Tensor, "*N K"] | None:
    """Return the ids of the student's top-k tokens, or None where that is the whole vocabulary."""
    if top_k is None or top_k >= student_logprobs.shape[-1]:
        return None
    return student_logprobs.detach().topk(top_k, dim=-1, sorted=False).indices


def on_support(logprobs: Float[Tensor, "*N V"], support: Int[Tensor, "*N K"], *, tail: bool) -> Float[Tensor, "*N _"]:
    """Reduce log-probs to the support: with the mass of all other tokens appended [K + 1], or renormalised [K]."""
    inside = logprobs.gather(-1, support)
    if not tail:
        return inside - inside.logsumexp(-1, keepdim=True)
    outside = logprobs.scatter(-1, support, -torch.inf)
    possible = outside.detach().amax(-1, keepdim=True) > -torch.inf
    # logsumexp over nothing but -inf has a NaN gradient, which the first `where` keeps out of the graph.
    rest = torch.where(possible, outside, 0.0).logsumexp(-1, keepdim=True)
    return torch.cat([inside, torch.where(possible, rest, -torch.inf)], dim=-1)


def divergence_from_logprobs(
    student: Float[Tensor, "*N V"], teacher: Float[Tensor, "*N V"], alpha: Alpha
) -> Float[Tensor, "*N"]:
    """Return the divergence of two log-distributions over the last axis; the gradient reaches `student` alone."""
    return cast(Tensor, _Divergence.apply(student, teacher, alpha))


def divergence_and_slope(
    student: Float[Tensor, "*N V"], teacher: Float[Tensor, "*N V"], alpha: Alpha
) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N V"]]:
    """Return the divergence and its derivative by each of the student's log-probs. The one place with the formulas."""
    if alpha == "symmetric":
        forward, forward_slope = divergence_and_slope(student, teacher, 0.0)
        reverse, reverse_slope = divergence_and_slope(student, teacher, 1.0)
        return (forward + reverse) / 2, (forward_slope + reverse_slope) / 2
    if alpha == 0.0:
        teacher_probs = teacher.exp()
        return (teacher_probs * _log_ratio(teacher_probs, teacher, student)).sum(-1), -teacher_probs
    student_probs = student.exp()
    if alpha == 1.0:
        log_ratio = _log_ratio(student_probs, student, teacher)
        return (student_probs * log_ratio).sum(-1), student_probs * (log_ratio + 1.0)
    mixture = torch.logaddexp(student + math.log1p(-alpha), teacher + math.log(alpha))
    teacher_probs = teacher.exp()
    from_student = (1.0 - alpha) * student_probs * _log_ratio(student_probs, student, mixture)
    from_teacher = alpha * teacher_probs * _log_ratio(teacher_probs, teacher, mixture)
    # The derivative through M cancels the + 1 that reverse KL has: only log(S / M) remains.
    return (from_student + from_teacher).sum(-1), from_student


def _log_ratio(p_probs: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return log p - log q, and 0 where p is impossible: 0 log 0 = 0."""
    return torch.where(p_probs > 0, p - q, 0.0)


class _Divergence(torch.autograd.Function):
    """Attaches the slope to the value, so that no infinity meets a zero on the way back."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, alpha: Alpha) -> Tensor:
        value, slope = divergence_and_slope(student, teacher, alpha)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.unsqueeze(-1) * ctx.saved_tensors[0], None, None

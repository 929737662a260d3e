"""Scores completion tokens chunk by chunk, forward and backward, without ever holding all their logits.

Enters: student hidden states [N, H], a head [V, H], target ids and the teacher's parts. Leaves: per-token values [N]
and their gradients. What survives a chunk's logits is chosen by what is trained:

    head frozen (LoRA)   each token's gradient by its hidden state, [N, H], is taken while its logits exist and the
                         backward pass only scales it: three products with the head in all, as with whole logits.
                         It is the divergence's gradient if there is a teacher, else the log-prob's; a loss that uses
                         both has the log-probs' logits computed again.
    head trained         its gradient is a sum over tokens that waits for the loss, so the student's logits are computed
                         again in the backward pass; the teacher's too if the whole vocabulary is compared.

The derivatives are written out (`Scoring.by_logits`) because they need two tensors [n, V] where autograd keeps eight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pmd.objective.divergence import Alpha, at_least_float32, divergence_and_slope, likeliest, on_support


@dataclass(frozen=True, slots=True)
class TeacherPart:
    """One policy that scores the completion; the teacher's logits are the weighted sum over its parts."""

    hidden: Tensor  # [N, H]
    head: Tensor  # [V, H]
    weight: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The divergence of one chunk and what its gradient needs."""

    divergence: Tensor  # [n]
    slope: Tensor  # of the divergence by the student's log-probs on the support
    on_support: tuple[Tensor, Tensor] | None  # ids [n, K] and student's log-probs there; None is the whole vocabulary


@dataclass(frozen=True, slots=True)
class Scoring:
    """What is compared and how; constants to autograd. All methods work on the rows of one chunk."""

    teacher: tuple[TeacherPart, ...]
    alpha: Alpha
    top_k: int | None
    tail: bool
    temperature: float
    chunk_tokens: int
    wants_gradient: bool

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Yield the rows of each chunk."""
        for start in range(0, num_tokens, self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, num_tokens))

    def student_logprobs(self, hidden: Tensor, head: Tensor) -> Tensor:
        """Return log-probs [n, V], in memory of their own."""
        return _normalised(_logits(hidden, head), self.temperature)

    def teacher_logprobs(self, rows: slice) -> Tensor:
        """Return the teacher's log-probs [n, V]: its parts' logits, weighted and summed, then normalised."""
        first, *others = self.teacher
        logits = _logits(first.hidden[rows], first.head).mul_(first.weight)
        for part in others:
            logits.add_(_logits(part.hidden[rows], part.head), alpha=part.weight)
        return _normalised(logits, self.temperature)

    def compare(self, student: Tensor, teacher: Tensor) -> Comparison:
        """Compare log-probs [n, V] on the support."""
        support = likeliest(student, self.top_k)
        if support is not None:
            student = on_support(student, support, tail=self.tail)
            teacher = on_support(teacher, support, tail=self.tail)
        divergence, slope = divergence_and_slope(student, teacher, self.alpha)
        return Comparison(divergence, slope, None if support is None else (support, student))

    def by_logits(self, student: Tensor, target: Tensor, comparison: Comparison | None) -> Tensor:
        """Return the derivative [n, V] by the student's logits z of the divergence D, or of the target's log-prob.

        With u the slope of D by log s: dD/dz_j = u_j - s_j sum(u) on the support. Outside it the tail's own share,
        u_tail - s_tail sum(u), is spread as the student spreads the tail's mass, s_j / s_tail. Overwrites `student`.
        """
        if comparison is None:
            return student.exp_().neg_().scatter_add_(-1, target, torch.ones_like(target, dtype=student.dtype))
        total = comparison.slope.sum(-1, keepdim=True)
        if comparison.on_support is None:
            return comparison.slope.sub_(student.exp_().mul_(total))
        support, supported = comparison.on_support
        by_logits = comparison.slope - supported.exp() * total  # [n, K] or, with the tail, [n, K + 1]
        if not self.tail:
            return student.zero_().scatter_(-1, support, by_logits)
        student.sub_(supported[:, -1:]).exp_().mul_(by_logits[:, -1:])
        return student.scatter_(-1, support, by_logits[:, :-1])


class ChunkedTerms(torch.autograd.Function):
    """(hidden, head) -> student log-probs, entropy and, with a teacher, divergence and teacher log-probs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, target_ids: Tensor, scoring: Scoring) -> tuple[Tensor, ...]:
        """Score all chunks; with the head frozen, take the gradient by the hidden states at once."""
        ctx.set_materialize_grads(False)
        hidden_needs, head_needs = (scoring.wants_gradient and needed for needed in ctx.needs_input_grad[:2])
        ctx.by_hidden = torch.empty_like(hidden) if hidden_needs and not head_needs else None
        ctx.comparisons = []
        dtype = at_least_float32(hidden[:0]).dtype
        columns = [hidden.new_empty(len(target_ids), dtype=dtype) for _ in range(4 if scoring.teacher else 2)]
        for rows in scoring.chunks(len(target_ids)):
            student, target = scoring.student_logprobs(hidden[rows], head), target_ids[rows, None]
            columns[0][rows] = student.gather(-1, target)[:, 0]
            columns[1][rows] = -torch.linalg.vecdot(student.exp(), student)
            comparison = None
            if scoring.teacher:
                teacher = scoring.teacher_logprobs(rows)
                comparison = scoring.compare(student, teacher)
                columns[2][rows], columns[3][rows] = comparison.divergence, teacher.gather(-1, target)[:, 0]
                del teacher
            if ctx.by_hidden is not None:
                by_logits = scoring.by_logits(student, target, comparison)
                ctx.by_hidden[rows] = _product(by_logits, head) / scoring.temperature
            elif head_needs:
                # A comparison of the whole vocabulary is too large to keep: it is made again.
                ctx.comparisons.append(comparison if comparison and comparison.on_support else None)
        ctx.save_for_backward(hidden, head, target_ids)
        ctx.scoring = scoring
        ctx.mark_non_differentiable(columns[1], *columns[3:])
        return tuple(columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Scale what was taken in the forward pass; compute logits again for the rest."""
        hidden, head, target_ids = ctx.saved_tensors
        scoring: Scoring = ctx.scoring
        by_logprobs, by_divergence = gradients[0], gradients[2] if scoring.teacher else None
        d_hidden = torch.zeros_like(hidden)
        d_head = torch.zeros_like(head, dtype=at_least_float32(head[:0]).dtype) if ctx.needs_input_grad[1] else None
        if ctx.by_hidden is not None:
            taken = by_divergence if scoring.teacher else by_logprobs
            if taken is not None:
                d_hidden = (ctx.by_hidden * taken[:, None]).to(hidden.dtype)
            by_logprobs, by_divergence = by_logprobs if scoring.teacher else None, None
        if by_logprobs is None and by_divergence is None:
            return d_hidden, d_head, None, None
        for number, rows in enumerate(scoring.chunks(len(target_ids))):
            student = scoring.student_logprobs(hidden[rows], head)
            by_logits = torch.zeros_like(student)
            if by_divergence is not None:
                comparison = ctx.comparisons[number] or scoring.compare(student, scoring.teacher_logprobs(rows))
                by_logits += (
                    scoring.by_logits(student.clone(), target_ids[rows, None], comparison) * by_divergence[rows, None]
                )
            if by_logprobs is not None:
                by_logits += scoring.by_logits(student, target_ids[rows, None], None) * by_logprobs[rows, None]
            by_logits /= scoring.temperature
            d_hidden[rows] += _product(by_logits, head)
            if d_head is not None:
                d_head += _product(by_logits.T, hidden[rows])
        return d_hidden, None if d_head is None else d_head.to(head.dtype), None, None


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Return logits [n, V], computed in the head's dtype and then at least float32."""
    return at_least_float32(hidden.to(head.dtype) @ head.T)


def _normalised(logits: Tensor, temperature: float) -> Tensor:
    """Return log-probs in the memory of `logits`."""
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _product(by_logits: Tensor, other: Tensor) -> Tensor:
    """Return by_logits @ other, computed in the dtype of `other`."""
    return by_logits.to(other.dtype) @ other

"""Scores completion tokens chunk by chunk, forward and backward, without ever holding all their logits.

Enters: student hidden states [N, H], a head [V, H], target ids and the teacher's parts. Leaves: per-token values [N]
and their gradients. What survives a chunk's logits is chosen by what is trained:

    head frozen (LoRA)   each token's gradient by its hidden state, [N, H], is taken while its logits exist and the
                         backward pass only scales it: three products with the head in all, as with whole logits.
                         It is the divergence's gradient if there is a teacher, else the log-prob's; a loss that uses
                         both has the log-probs' logits computed again.
    head trained         its gradient is a sum over tokens that waits for the loss, so the student's logits are computed
                         again in the backward pass; the teacher's too if the whole vocabulary is compared.

The derivatives are written out (`Scoring.by_logits`) because they need three tensors [n, V], shared by all chunks,
where autograd keeps eight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pmd.objective.divergence import Alpha, at_least_float32, divergence_and_slope, likeliest, on_support

#: Below this mass of the tail, a sum of float32 probabilities may have lost digits to underflow.
FAINT_TAIL = 1e-20


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
        logits = torch.empty(len(hidden), len(head), dtype=at_least_float32(hidden[:0]).dtype, device=hidden.device)
        return self.normalised(_logits(hidden, head, logits), torch.empty_like(logits))

    def teacher_logprobs(self, rows: slice, out: Tensor, probs: Tensor) -> Tensor:
        """Write the teacher's log-probs [n, V] to `out`: its parts' logits, weighted, summed, then normalised."""
        first, *others = self.teacher
        logits = _logits(first.hidden[rows], first.head, out).mul_(first.weight)
        for part in others:
            logits.add_(_logits(part.hidden[rows], part.head, probs), alpha=part.weight)
        return self.normalised(logits, probs)

    def normalised(self, logits: Tensor, probs: Tensor) -> Tensor:
        """Turn logits into log-probs in their own memory; `probs` receives the probabilities."""
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        logits.sub_(logits.amax(-1, keepdim=True))
        total = torch.exp(logits, out=probs).sum(-1, keepdim=True)
        probs.div_(total)
        return logits.sub_(total.log())

    def compare(self, student: Tensor, teacher: Tensor) -> Comparison:
        """Compare log-probs [n, V] on the support, or [n, V] whole."""
        support = likeliest(student, self.top_k)
        if support is not None:
            student = on_support(student, support, tail=self.tail)
            teacher = on_support(teacher, support, tail=self.tail)
        divergence, slope = divergence_and_slope(student, teacher, self.alpha)
        return Comparison(divergence, slope, None if support is None else (support, student))

    def compare_in_place(self, rows: slice, target: Tensor, buffers: Sequence[Tensor]) -> tuple[Comparison, Tensor]:
        """Compare log-probs in buffer 0 (probs in buffer 1) with the teacher's; return its target log-probs too.

        With a support, buffer 1 is left with the student's distribution outside it, given that the token lies there,
        and buffer 0 is overwritten; without one, buffer 0 keeps the student's log-probs.
        """
        student, probs, third = buffers
        support = likeliest(student, self.top_k)
        if support is None:
            teacher = self.teacher_logprobs(rows, third, probs)
            return self.compare(student, teacher), teacher.gather(-1, target)[:, 0]
        student_reduced = self.reduced(student, probs, support)
        teacher = self.teacher_logprobs(rows, student, third)
        teacher_target = teacher.gather(-1, target)[:, 0]
        teacher_reduced = self.reduced(teacher, third, support)
        divergence, slope = divergence_and_slope(student_reduced, teacher_reduced, self.alpha)
        return Comparison(divergence, slope, (support, student_reduced)), teacher_target

    def reduced(self, logprobs: Tensor, probs: Tensor, support: Tensor) -> Tensor:
        """Return what `on_support` returns, without copies; `probs` becomes the distribution outside the support."""
        inside = logprobs.gather(-1, support)
        if not self.tail:
            return inside - inside.logsumexp(-1, keepdim=True)
        rest = probs.scatter_(-1, support, 0.0).sum(-1, keepdim=True)
        log_rest, faint = rest.log(), rest[:, 0] < FAINT_TAIL
        if faint.any():
            exact = on_support(logprobs[faint], support[faint], tail=True)[:, -1:]
            log_rest[faint], rest[faint] = exact, 1.0
            outside = (logprobs[faint] - exact).exp().nan_to_num(0.0, posinf=0.0)
            probs[faint] = outside.scatter(-1, support[faint], 0.0)
        probs.div_(rest)
        return torch.cat([inside, log_rest], dim=-1)

    def by_logits_in_place(self, target: Tensor, comparison: Comparison | None, buffers: Sequence[Tensor]) -> Tensor:
        """Return what `by_logits` returns, from what `compare_in_place` left in the buffers."""
        if comparison is None:
            return _target_slope(buffers[1], target)
        if comparison.on_support is None or not self.tail:
            return self.by_logits(buffers[0], target, comparison)
        by_logits = self._slope_on_support(comparison)
        return buffers[1].mul_(by_logits[:, -1:]).scatter_(-1, comparison.on_support[0], by_logits[:, :-1])

    def by_logits(self, student: Tensor, target: Tensor, comparison: Comparison | None) -> Tensor:
        """Return the derivative [n, V] by the student's logits z of the divergence D, or of the target's log-prob.

        With u the slope of D by log s: dD/dz_j = u_j - s_j sum(u) on the support. Outside it the tail's own share,
        u_tail - s_tail sum(u), is spread as the student spreads the tail's mass, s_j / s_tail. Overwrites `student`.
        """
        if comparison is None:
            return _target_slope(student.exp_(), target)
        if comparison.on_support is None:
            total = comparison.slope.sum(-1, keepdim=True)
            return comparison.slope.sub_(student.exp_().mul_(total))
        support, supported = comparison.on_support
        by_logits = self._slope_on_support(comparison)
        if not self.tail:
            return student.zero_().scatter_(-1, support, by_logits)
        student.sub_(supported[:, -1:]).exp_().mul_(by_logits[:, -1:])
        return student.scatter_(-1, support, by_logits[:, :-1])

    def _slope_on_support(self, comparison: Comparison) -> Tensor:
        """Return the derivative by the logits on the support: [n, K] or, with the tail, [n, K + 1]."""
        assert comparison.on_support is not None
        return comparison.slope - comparison.on_support[1].exp() * comparison.slope.sum(-1, keepdim=True)


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
        memory = _buffers(hidden, head, min(scoring.chunk_tokens, len(target_ids)), dtype)
        for rows in scoring.chunks(len(target_ids)):
            buffers = [buffer[: rows.stop - rows.start] for buffer in memory]
            target = target_ids[rows, None]
            student = scoring.normalised(_logits(hidden[rows], head, buffers[0]), buffers[1])
            columns[0][rows] = student.gather(-1, target)[:, 0]
            columns[1][rows] = -torch.bmm(buffers[1][:, None], student[:, :, None])[:, 0, 0]
            comparison = None
            if scoring.teacher:
                comparison, columns[3][rows] = scoring.compare_in_place(rows, target, buffers)
                columns[2][rows] = comparison.divergence
            if ctx.by_hidden is not None:
                by_logits = scoring.by_logits_in_place(target, comparison, buffers)
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
            student, target = scoring.student_logprobs(hidden[rows], head), target_ids[rows, None]
            by_logits = None
            if by_divergence is not None:
                comparison = ctx.comparisons[number] if ctx.comparisons else None
                if comparison is None:
                    teacher = torch.empty_like(student)
                    scoring.teacher_logprobs(rows, teacher, torch.empty_like(student))
                    comparison = scoring.compare(student, teacher)
                own = student if by_logprobs is None else student.clone()
                by_logits = scoring.by_logits(own, target, comparison).mul_(by_divergence[rows, None])
            if by_logprobs is not None:
                of_target = scoring.by_logits(student, target, None).mul_(by_logprobs[rows, None])
                by_logits = of_target if by_logits is None else by_logits.add_(of_target)
            assert by_logits is not None
            by_logits /= scoring.temperature
            d_hidden[rows] += _product(by_logits, head)
            if d_head is not None:
                d_head += _product(by_logits.T, hidden[rows])
        return d_hidden, None if d_head is None else d_head.to(head.dtype), None, None


def _buffers(hidden: Tensor, head: Tensor, num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Return the three tensors [chunk, V] of all chunks: a CPU needs longer to get fresh memory than to fill it."""
    return [torch.empty(num_tokens, len(head), dtype=dtype, device=hidden.device) for _ in range(3)]


def _logits(hidden: Tensor, head: Tensor, out: Tensor) -> Tensor:
    """Write logits [n, V] to `out`, computed in the head's dtype."""
    hidden = hidden.to(head.dtype)
    return torch.mm(hidden, head.T, out=out) if out.dtype == head.dtype else out.copy_(hidden @ head.T)


def _target_slope(probs: Tensor, target: Tensor) -> Tensor:
    """Return the derivative of the target's log-prob by the logits, in the memory of `probs`."""
    return probs.neg_().scatter_add_(-1, target, torch.ones_like(target, dtype=probs.dtype))


def _product(by_logits: Tensor, other: Tensor) -> Tensor:
    """Return by_logits @ other, computed in the dtype of `other`."""
    return by_logits.to(other.dtype) @ other

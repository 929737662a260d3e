"""What `fused.py` computes, on a GPU: the same chunks of tokens, with Triton kernels between the products.

    student's logits [n, V] of a chunk                              one product with the head
      -> top-k tokens, mass of all others                           `select`
    teacher's logits, one slab [n, W] of the vocabulary at a time   one product
      -> logits at the student's top-k, mass of all others          `absorb`
    divergence and its gradient on [n, K + 1] numbers               the reference implementation itself, by autograd
      -> gradient w.r.t. the student's logits, in their place       `write_gradient`
      -> gradient w.r.t. the hidden states                          one product

Logits are float32 even if the head is bfloat16: rounded to bfloat16, logits near 20 are off by up to 0.06, more than
most divergences. Their gradient is rounded to the head's dtype, as autograd would, and so is that of the hidden states.

Bytes per student logit with a teacher and top-k: 4 written by a product, 3 x 4 read and 2 written by kernels, 2 read by
a product; per teacher logit 4 written and 4 read. So the kernels move 18 bytes a pair of logits: 22 GB, 5 to 8 ms on a
Hopper GPU, for 8,192 tokens of 151,936, beside 39 ms for the products.

Not done here, but in `fused.py`: comparisons over the whole vocabulary, and float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from pmd.losses.distillation import (
    SLAB_TOKENS,
    Alpha,
    TeacherPart,
    TokenTerms,
    kernel_chunk_size,
    per_token_divergence,
)
from pmd.losses.triton_kernels import Gradient, Launch, Rows, absorb, can_select, empty_rows, select, write_gradient

#: Whether a product can have float32 results of half-precision factors (torch 2.8, CUDA).
WIDENS = "dtype_out" in torch.ops.aten.mm.overloads()


@dataclass(frozen=True, slots=True)
class Plan:
    """What exists at once, and which kernels run; `benchmarks/gpu/loss.py` compares a few."""

    chunk_tokens: int | None = None  # None uses `kernel_chunk_size`
    slab_tokens: int = SLAB_TOKENS
    sorts: bool = False  # top-k by torch.topk
    logits_dtype: torch.dtype = torch.float32
    launch: Launch = field(default_factory=Launch)


def supports(hidden: Tensor, head: Tensor, teacher: Sequence[TeacherPart], top_k: int | None) -> bool:
    """Whether the kernels compute this: float32 at most, and a teacher is compared on a support."""
    dtypes = {hidden.dtype, head.dtype, *(tensor.dtype for part in teacher for tensor in (part.hidden, part.head))}
    return torch.float64 not in dtypes and (not teacher or (top_k is not None and top_k < len(head)))


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
    plan: Plan | None = None,
) -> TokenTerms:
    """Score N completion tokens, and compare with the teacher if there is one; see `distillation.token_terms`.

    The arguments must have been checked, and `supports` must be true.
    """
    plan = plan or Plan()
    scoring = Scoring(
        tuple(TeacherPart(part.hidden.detach(), part.head.detach(), part.weight) for part in teacher),
        alpha, top_k if teacher else None, tail, 1.0 / temperature,
        chunk_tokens or plan.chunk_tokens or kernel_chunk_size(len(student_head), plan.logits_dtype.itemsize), plan,
        wants_gradient=torch.is_grad_enabled(),
    )  # fmt: skip
    terms = KernelTerms.apply(student_hidden, student_head, target_ids, scoring)
    return TokenTerms(*cast(tuple[Tensor, ...], terms))


@dataclass(frozen=True, slots=True)
class Normalised:
    """Sums over the whole vocabulary, row by row; all [n]."""

    maximum: Tensor
    log_total: Tensor  # log sum exp(x - maximum)
    log_others: Tensor  # the same of the tokens that are not removed picks
    entropy: Tensor


@dataclass(frozen=True, slots=True)
class Comparison:
    """The divergence of one chunk [n], and its gradient w.r.t. the student's logits on the support and the tail."""

    divergence: Tensor
    on_support: Tensor  # [n, K]
    on_tail: Tensor  # [n]


@dataclass(frozen=True, slots=True)
class Scoring:
    """What is compared and how; constant for autograd."""

    teacher: tuple[TeacherPart, ...]
    alpha: Alpha
    top_k: int | None
    tail: bool
    scale: float
    chunk_tokens: int
    plan: Plan
    wants_gradient: bool

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Yield the rows of each chunk."""
        return _slices(num_tokens, self.chunk_tokens)

    def student_rows(self, logits: Tensor, targets: Tensor) -> Rows:
        """Reduce the student's logits [n, V] to the support, if there is one, and the target."""
        launch, scale = self.plan.launch, self.scale
        if self.top_k is not None and can_select(self.top_k, logits.shape[1], launch) and not self.plan.sorts:
            return select(logits, targets, self.top_k, scale, launch)
        picks = targets[:, None]
        if self.top_k is not None:
            picks = torch.cat([logits.topk(self.top_k, dim=-1, sorted=False).indices, picks], dim=-1)
        rows = empty_rows(picks.int())
        absorb(logits, 0, self.top_k or 0, scale, rows, launch)
        return rows

    def streamed_rows(self, parts: Sequence[TeacherPart], here: slice, ids: Tensor, memory: Tensor) -> Rows:
        """Reduce logits to the picked tokens without ever holding more than a slab [n, W] of them."""
        rows = empty_rows(ids)
        for tokens in _slices(len(parts[0].head), self.plan.slab_tokens):
            slab = memory[: len(ids) * (tokens.stop - tokens.start)].view(len(ids), -1)
            for number, part in enumerate(parts):
                hidden, head = part.hidden[here], part.head[tokens]
                if number:
                    slab.add_(_product(hidden, head.T, torch.empty_like(slab)), alpha=part.weight)
                else:
                    _product(hidden, head.T, slab)
                    if part.weight != 1.0:
                        slab.mul_(part.weight)
            absorb(slab, tokens.start, self.top_k or 0, self.scale, rows, self.plan.launch)
        return rows

    def normalised(self, rows: Rows) -> Normalised:
        """Combine the picked tokens with the others."""
        maximum, total, moment = rows.maximum, rows.total, rows.moment
        support = rows.picked[:, : self.top_k or 0]
        if self.top_k is not None:
            maximum = torch.maximum(maximum, support.amax(-1))
        step, inside = rows.maximum - maximum, (support - maximum[:, None]).exp()
        total = step.exp() * rows.total + inside.sum(-1)
        moment = step.exp() * (rows.moment + step * rows.total) - torch.special.entr(inside).sum(-1)
        return Normalised(maximum, total.log(), step + rows.total.log(), total.log() - moment / total)

    def target_logprobs(self, rows: Rows, sums: Normalised) -> Tensor:
        """Return the log-probs [n] of the targets."""
        return rows.picked[:, -1] - sums.maximum - sums.log_total

    def compare(self, student: tuple[Rows, Normalised], teacher: tuple[Rows, Normalised]) -> Comparison:
        """Compare student and teacher on the student's support, and differentiate w.r.t. the student's logits.

        The logit of the tail is the logarithm of its mass, relative to the maximum like the others.
        """
        logits, other = (self._on_support(rows, sums) for rows, sums in (student, teacher))
        with torch.enable_grad():
            logits.requires_grad_()
            divergence = per_token_divergence(logits.log_softmax(-1), other.log_softmax(-1), self.alpha)
            (gradient,) = torch.autograd.grad(divergence.sum(), logits)
        on_tail = gradient[:, -1] if self.tail else gradient.new_zeros(len(gradient))
        return Comparison(divergence.detach(), gradient[:, : self.top_k], on_tail)

    def _on_support(self, rows: Rows, sums: Normalised) -> Tensor:
        support = rows.picked[:, : self.top_k] - sums.maximum[:, None]
        return torch.cat([support, sums.log_others[:, None]], dim=-1) if self.tail else support

    def write_gradient(
        self,
        logits: Tensor,
        dtype: torch.dtype,
        student: tuple[Rows, Normalised],
        comparison: Comparison | None,
        logprob_weight: Tensor | None,
        divergence_weight: Tensor | None,
    ) -> Tensor:
        """Overwrite logits [n, V] with the gradient of the weighted log-probs and divergences [n] w.r.t. them.

        Of the divergence, outside of the support: the tail's share, in proportion to the probabilities there.
        Of the target's log-prob: 1 at the target, minus the probabilities.
        """
        rows, sums = student
        ids, terms = rows.ids, []
        values = torch.zeros_like(rows.picked)
        if divergence_weight is not None:
            assert comparison is not None
            # Where nothing is outside of the support, exp(-inf - log_others) must be 0, not NaN.
            norm = torch.where(sums.log_others > -torch.inf, sums.log_others, 0.0)
            on_tail = divergence_weight * comparison.on_tail
            terms.append((on_tail, norm))
            values[:, :-1] += divergence_weight[:, None] * comparison.on_support
            values[:, -1] = on_tail * (rows.picked[:, -1] - sums.maximum - norm).exp()
            values[:, -1] = self._at_target(ids, values)
        if logprob_weight is not None:
            terms.append((-logprob_weight, sums.log_total))
            probs = (rows.picked - sums.maximum[:, None] - sums.log_total[:, None]).exp()
            values += logprob_weight[:, None] * ((ids == ids[:, -1:]).float() - probs)
        gradient = Gradient(sums.maximum, tuple(terms), ids, values)
        return write_gradient(logits, gradient, self.scale, dtype, self.plan.launch)

    @staticmethod
    def _at_target(ids: Tensor, values: Tensor) -> Tensor:
        """Return the values [n] at the targets, which may be in the support."""
        same = ids[:, :-1] == ids[:, -1:]
        return torch.where(same.any(-1), torch.where(same, values[:, :-1], 0.0).sum(-1), values[:, -1])


class KernelTerms(torch.autograd.Function):
    """(hidden, head) -> student log-probs, entropy and, with a teacher, divergence and teacher log-probs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, target_ids: Tensor, scoring: Scoring) -> tuple[Tensor, ...]:
        """Score all chunks; if the head is frozen, also compute the gradient w.r.t. the hidden states."""
        ctx.set_materialize_grads(False)
        hidden_needs, head_needs = (scoring.wants_gradient and needed for needed in ctx.needs_input_grad[:2])
        # Rounded once, when it has been scaled.
        ctx.hidden_gradient = torch.empty_like(hidden, dtype=torch.float32) if hidden_needs and not head_needs else None
        ctx.kept = []
        holds_chunk = scoring.top_k is not None or ctx.hidden_gradient is not None
        chunk, slab = _memory(scoring, hidden, head, holds_chunk)
        columns = [hidden.new_empty(len(target_ids), dtype=torch.float32) for _ in range(4 if scoring.teacher else 2)]
        for here in scoring.chunks(len(target_ids)):
            targets = target_ids[here]
            if holds_chunk:
                logits = _product(hidden[here], head.T, chunk[: len(targets)])
                rows = scoring.student_rows(logits, targets)
            else:
                rows = scoring.streamed_rows([TeacherPart(hidden, head)], here, targets[:, None].int(), slab)
            sums, comparison = scoring.normalised(rows), None
            columns[0][here], columns[1][here] = scoring.target_logprobs(rows, sums), sums.entropy
            if scoring.teacher:
                of_teacher = scoring.streamed_rows(scoring.teacher, here, rows.ids, slab)
                teacher_sums = scoring.normalised(of_teacher)
                comparison = scoring.compare((rows, sums), (of_teacher, teacher_sums))
                columns[2][here] = comparison.divergence
                columns[3][here] = scoring.target_logprobs(of_teacher, teacher_sums)
            if ctx.hidden_gradient is not None:
                ones = torch.ones_like(sums.maximum)
                weights = (None, ones) if comparison else (ones, None)
                gradient = scoring.write_gradient(logits, head.dtype, (rows, sums), comparison, *weights)
                _product(gradient, head, ctx.hidden_gradient[here])
            if scoring.wants_gradient:
                ctx.kept.append(((rows, sums), comparison))
        ctx.save_for_backward(hidden, head, target_ids)
        ctx.scoring = scoring
        ctx.mark_non_differentiable(columns[1], *columns[3:])
        return tuple(columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Scale the gradient from the forward pass; recompute logits for the rest."""
        hidden, head, target_ids = ctx.saved_tensors
        scoring: Scoring = ctx.scoring
        by_logprob, by_divergence = gradients[0], gradients[2] if scoring.teacher else None
        d_hidden = torch.zeros_like(hidden)
        d_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        if ctx.hidden_gradient is not None:
            taken = by_divergence if scoring.teacher else by_logprob
            if taken is not None:
                d_hidden = (ctx.hidden_gradient * taken[:, None]).to(hidden.dtype)
            by_logprob, by_divergence = by_logprob if scoring.teacher else None, None
        if by_logprob is None and by_divergence is None:
            return d_hidden, d_head, None, None
        chunk, _ = _memory(scoring, hidden, head, holds_chunk=True)
        for here, (student, comparison) in zip(scoring.chunks(len(target_ids)), ctx.kept, strict=True):
            logits = _product(hidden[here], head.T, chunk[: here.stop - here.start])
            weights = [None if by is None else by[here] for by in (by_logprob, by_divergence)]
            gradient = scoring.write_gradient(logits, head.dtype, student, comparison, *weights)
            d_hidden[here] += _product(gradient, head, torch.empty_like(d_hidden[here]))
            if d_head is not None:
                _add_product(d_head, gradient.T, hidden[here])
        return d_hidden, None if d_head is None else d_head.to(head.dtype), None, None


def _memory(scoring: Scoring, hidden: Tensor, head: Tensor, holds_chunk: bool) -> tuple[Tensor, Tensor]:
    """Return memory for a chunk of logits [n, V], and for a slab."""
    num_tokens, dtype = min(scoring.chunk_tokens, len(hidden)), scoring.plan.logits_dtype
    slab_tokens = min(scoring.plan.slab_tokens, len(head))
    streams = bool(scoring.teacher) or not holds_chunk
    chunk = torch.empty(num_tokens if holds_chunk else 0, len(head), dtype=dtype, device=hidden.device)
    return chunk, torch.empty(num_tokens * slab_tokens if streams else 0, dtype=dtype, device=hidden.device)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write left @ right to `out`, computed in the dtype of `right`; results in float32 are not rounded to it first."""
    left = left.to(right.dtype)
    if out.dtype == right.dtype:
        return torch.mm(left, right, out=out)
    if WIDENS and out.is_cuda and out.dtype == torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return out.copy_(left @ right)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a float32 `total`, computed in the dtype of `left`."""
    right = right.to(left.dtype)
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif WIDENS and total.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.add_(left @ right)

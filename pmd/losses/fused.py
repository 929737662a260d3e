"""Computes the same numbers as `distillation.py` with a hand-written gradient: faster, and in less memory.

Logits exist for one chunk of tokens at a time. What is kept of a chunk after its logits are gone depends on what is
trained:

    head frozen (LoRA)   the gradient w.r.t. each token's hidden state, [N, H], is computed while its logits exist, and
                         the backward pass only scales it: three products with the head in total, as with whole logits.
                         It is the divergence's gradient if there is a teacher, else the log-prob's; if the loss uses
                         both, logits are recomputed for the log-probs.
    head trained         its gradient is a sum over tokens that depends on the loss, so the student's logits are
                         recomputed in the backward pass; the teacher's too if the whole vocabulary is compared.

Chunks are as large as memory allows, so that the products with the head are efficient: two tensors [chunk, V], one for
the student and one for the teacher. Everything between the products runs block by block, to stay in a CPU's cache. The
gradients (`Scoring.logit_gradient`) overwrite the student's logits; autograd would keep eight tensors.

On a GPU with Triton, `fused_triton.py` computes what it can, the same way with kernels between the products.
"""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from pmd.losses.distillation import (
    Alpha,
    TeacherPart,
    TokenTerms,
    at_least_float32,
    check_aligned,
    check_comparison,
    chunk_size,
    on_support,
)

#: How many blocks a chunk is split into: a few MB each for a CPU's cache, few kernel launches on a GPU.
BLOCKS = {"cpu": 32, "cuda": 4}
#: Below this tail mass, a sum of float32 probabilities may have lost digits to underflow.
FAINT_TAIL = 1e-20


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
    """Score N completion tokens, and compare with the teacher if there is one; see `distillation.token_terms`."""
    check_comparison(alpha, top_k, temperature)
    check_aligned(student_hidden, student_head, target_ids, teacher)
    device = student_hidden.device.type
    score = torch_token_terms
    if device == "cuda" and has_kernels():
        from pmd.losses import fused_triton

        if fused_triton.supports(student_hidden, student_head, teacher, top_k):
            score = fused_triton.token_terms
    with torch.autocast(device, enabled=False):
        return score(
            student_hidden, student_head, target_ids, teacher,
            alpha=alpha, top_k=top_k, tail=tail, temperature=temperature, chunk_tokens=chunk_tokens,
        )  # fmt: skip


def torch_token_terms(
    student_hidden: Tensor,
    student_head: Tensor,
    target_ids: Tensor,
    teacher: Sequence[TeacherPart] = (),
    *,
    alpha: Alpha = 1.0,
    top_k: int | None = None,
    tail: bool = True,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> TokenTerms:
    """Return `token_terms` without Triton, from arguments that have been checked."""
    device = student_hidden.device.type
    chunk_tokens = chunk_tokens or chunk_size(device, len(student_head))
    scoring = Scoring(
        tuple(TeacherPart(part.hidden.detach(), part.head.detach(), part.weight) for part in teacher),
        alpha, top_k, tail, temperature,
        chunk_tokens, block_size(device, chunk_tokens),
        wants_gradient=torch.is_grad_enabled(),
    )  # fmt: skip
    return TokenTerms(*cast(tuple[Tensor, ...], ChunkedTerms.apply(student_hidden, student_head, target_ids, scoring)))


def has_kernels() -> bool:
    """Whether Triton is installed and compiles for the GPU: from compute capability 8.0 on, it has bfloat16."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability() >= (8, 0)


def block_size(device_type: str, chunk_tokens: int) -> int:
    """Return how many of a chunk's tokens are processed at once between the matrix products."""
    return math.ceil(chunk_tokens / BLOCKS.get(device_type, BLOCKS["cuda"]))


@dataclass(frozen=True, slots=True)
class Comparison:
    """The divergence of one chunk and what its gradient needs."""

    divergence: Tensor  # [n]
    gradient: Tensor  # of the divergence w.r.t. the student's log-probs on the support
    on_support: tuple[Tensor, Tensor] | None  # ids [n, K] and student's log-probs there; None is the whole vocabulary


@dataclass(frozen=True, slots=True)
class Scoring:
    """What is compared and how; constant for autograd. All methods work on the rows of one chunk or block."""

    teacher: tuple[TeacherPart, ...]
    alpha: Alpha
    top_k: int | None
    tail: bool
    temperature: float
    chunk_tokens: int
    block_tokens: int
    wants_gradient: bool

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Yield the rows of each chunk."""
        yield from _slices(0, num_tokens, self.chunk_tokens)

    def blocks(self, rows: slice) -> Iterator[tuple[slice, slice]]:
        """Yield the rows of each block of a chunk: among all tokens, and within the chunk."""
        for block in _slices(rows.start, rows.stop, self.block_tokens):
            yield block, slice(block.start - rows.start, block.stop - rows.start)

    def teacher_logits(self, rows: slice, out: Tensor) -> Tensor:
        """Write the teacher's logits [n, V] to the first n rows of `out`: its parts' logits, weighted and summed."""
        first, *others = self.teacher
        logits = _logits(first.hidden[rows], first.head, out)
        if first.weight != 1.0:
            logits.mul_(first.weight)
        for part in others:
            _add_product(logits, part.hidden[rows], part.head.T, part.weight)
        return logits

    def normalised(self, logits: Tensor, probs: Tensor) -> Tensor:
        """Turn logits into log-probs in their own memory; `probs` receives the probabilities."""
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        logits.sub_(logits.amax(-1, keepdim=True))
        total = torch.exp(logits, out=probs).sum(-1, keepdim=True)
        probs.div_(total)
        return logits.sub_(total.log())

    def compare(self, student: Tensor, probs: Tensor, teacher: Tensor, teacher_probs: Tensor) -> Comparison:
        """Compare log-probs [n, V], given with their probabilities, on the support.

        If there is a support, `probs` becomes the student's distribution conditioned on the tokens outside it.
        """
        support = likeliest(student, self.top_k)
        if support is not None:
            student, teacher = self.reduced(student, probs, support), self.reduced(teacher, teacher_probs, support)
        divergence, gradient = divergence_and_gradient(student, teacher, self.alpha)
        return Comparison(divergence, gradient, None if support is None else (support, student))

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
            probs[faint] = (logprobs[faint] - exact).exp().nan_to_num(0.0, posinf=0.0)
        probs.div_(rest)
        return torch.cat([inside, log_rest], dim=-1)

    def logit_gradient_in_place(
        self, student: Tensor, probs: Tensor, target: Tensor, comparison: Comparison | None
    ) -> Tensor:
        """Return what `logit_gradient` returns, from what `compare` left in `probs`."""
        if comparison is None:
            return _target_gradient(probs, target)
        if comparison.on_support is None or not self.tail:
            return self.logit_gradient(student, target, comparison)
        gradient = self._gradient_on_support(comparison)
        return probs.mul_(gradient[:, -1:]).scatter_(-1, comparison.on_support[0], gradient[:, :-1])

    def logit_gradient(self, student: Tensor, target: Tensor, comparison: Comparison | None) -> Tensor:
        """Return the gradient [n, V] of the divergence D, or of the target's log-prob, w.r.t. the student's logits z.

        With u the gradient of D w.r.t. log s: dD/dz_j = u_j - s_j sum(u) on the support. Outside it, the tail's share,
        u_tail - s_tail sum(u), is divided in proportion to the student's probabilities, s_j / s_tail.
        Overwrites `student`.
        """
        if comparison is None:
            return _target_gradient(student.exp_(), target)
        if comparison.on_support is None:
            total = comparison.gradient.sum(-1, keepdim=True)
            return comparison.gradient.sub_(student.exp_().mul_(total))
        support, supported = comparison.on_support
        gradient = self._gradient_on_support(comparison)
        if not self.tail:
            return student.zero_().scatter_(-1, support, gradient)
        student.sub_(supported[:, -1:]).exp_().mul_(gradient[:, -1:])
        return student.scatter_(-1, support, gradient[:, :-1])

    def weighted_logit_gradient(
        self,
        student: Tensor,
        target: Tensor,
        comparison: Comparison | None,
        logprob_gradient: Tensor | None,
        divergence_gradient: Tensor | None,
    ) -> Tensor:
        """Return the loss's gradient [n, V] w.r.t. the logits, from those w.r.t. log-probs and divergence, each [n, 1].

        Overwrites `student`.
        """
        if divergence_gradient is None:
            assert logprob_gradient is not None
            return self.logit_gradient(student, target, None).mul_(logprob_gradient)
        own = student if logprob_gradient is None else student.clone()
        gradient = self.logit_gradient(own, target, comparison).mul_(divergence_gradient)
        if logprob_gradient is not None:
            gradient.add_(self.logit_gradient(student, target, None).mul_(logprob_gradient))
        return gradient

    def _gradient_on_support(self, comparison: Comparison) -> Tensor:
        """Return the gradient w.r.t. the logits on the support: [n, K] or, with the tail, [n, K + 1]."""
        assert comparison.on_support is not None
        return comparison.gradient - comparison.on_support[1].exp() * comparison.gradient.sum(-1, keepdim=True)


class ChunkedTerms(torch.autograd.Function):
    """(hidden, head) -> student log-probs, entropy and, with a teacher, divergence and teacher log-probs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, target_ids: Tensor, scoring: Scoring) -> tuple[Tensor, ...]:
        """Score all chunks; if the head is frozen, also compute the gradient w.r.t. the hidden states."""
        ctx.set_materialize_grads(False)
        hidden_needs, head_needs = (scoring.wants_gradient and needed for needed in ctx.needs_input_grad[:2])
        ctx.hidden_gradient = torch.empty_like(hidden) if hidden_needs and not head_needs else None
        ctx.comparisons = []
        policies = 2 if scoring.teacher else 1
        chunk, scratch = _memory(scoring, hidden, head, policies)
        columns = [chunk[0].new_empty(len(target_ids)) for _ in range(2 * policies)]
        for rows in scoring.chunks(len(target_ids)):
            student_logits = _logits(hidden[rows], head, chunk[0])
            teacher_logits = scoring.teacher_logits(rows, chunk[1]) if scoring.teacher else None
            for block, here in scoring.blocks(rows):
                target, probs = target_ids[block, None], scratch[0][: block.stop - block.start]
                student = scoring.normalised(student_logits[here], probs)
                columns[0][block] = student.gather(-1, target)[:, 0]
                columns[1][block] = entropy(student, probs)
                comparison = None
                if teacher_logits is not None:
                    teacher_probs = scratch[1][: len(probs)]
                    teacher = scoring.normalised(teacher_logits[here], teacher_probs)
                    columns[3][block] = teacher.gather(-1, target)[:, 0]
                    comparison = scoring.compare(student, probs, teacher, teacher_probs)
                    columns[2][block] = comparison.divergence
                if ctx.hidden_gradient is not None:
                    student.copy_(scoring.logit_gradient_in_place(student, probs, target, comparison))
                elif head_needs:
                    # A comparison of the whole vocabulary is too large to keep; it is recomputed.
                    ctx.comparisons.append(comparison if comparison and comparison.on_support else None)
            if ctx.hidden_gradient is not None:
                ctx.hidden_gradient[rows] = _product(student_logits, head) / scoring.temperature
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
        logprob_gradient, divergence_gradient = gradients[0], gradients[2] if scoring.teacher else None
        d_hidden = torch.zeros_like(hidden)
        d_head = torch.zeros_like(head, dtype=at_least_float32(head[:0]).dtype) if ctx.needs_input_grad[1] else None
        if ctx.hidden_gradient is not None:
            taken = divergence_gradient if scoring.teacher else logprob_gradient
            if taken is not None:
                d_hidden = (ctx.hidden_gradient * taken[:, None]).to(hidden.dtype)
            logprob_gradient, divergence_gradient = logprob_gradient if scoring.teacher else None, None
        if logprob_gradient is None and divergence_gradient is None:
            return d_hidden, d_head, None, None
        comparisons = iter(ctx.comparisons)
        compares_again = divergence_gradient is not None and not any(ctx.comparisons)
        chunk, scratch = _memory(scoring, hidden, head, 2 if compares_again else 1)
        for rows in scoring.chunks(len(target_ids)):
            logits = _logits(hidden[rows], head, chunk[0])
            teacher_logits = scoring.teacher_logits(rows, chunk[1]) if compares_again else None
            for block, here in scoring.blocks(rows):
                probs = scratch[0][: block.stop - block.start]
                student = scoring.normalised(logits[here], probs)
                comparison = next(comparisons, None)
                if teacher_logits is not None:
                    teacher_probs = scratch[1][: len(probs)]
                    teacher = scoring.normalised(teacher_logits[here], teacher_probs)
                    comparison = scoring.compare(student, probs, teacher, teacher_probs)
                weights = [None if by is None else by[block, None] for by in (logprob_gradient, divergence_gradient)]
                student.copy_(scoring.weighted_logit_gradient(student, target_ids[block, None], comparison, *weights))
            logits /= scoring.temperature
            d_hidden[rows] += _product(logits, head)
            if d_head is not None:
                _add_product(d_head, logits.T, hidden[rows])
        return d_hidden, None if d_head is None else d_head.to(head.dtype), None, None


def entropy(logprobs: Tensor, probs: Tensor) -> Tensor:
    """Return the entropy [n] of each row, with 0 log 0 = 0."""
    entropies = -torch.bmm(probs[:, None], logprobs[:, :, None])[:, 0, 0]
    if (forbids := entropies.isnan()).any():  # 0 * -inf, for a token with probability 0
        entropies[forbids] = torch.special.entr(probs[forbids]).sum(-1)
    return entropies


def _memory(scoring: Scoring, hidden: Tensor, head: Tensor, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return `count` tensors [chunk, V] and as many [block, V]: on a CPU, allocating takes longer than filling."""
    chunk_tokens = min(scoring.chunk_tokens, len(hidden))
    dtype = at_least_float32(hidden[:0]).dtype
    chunk, scratch = (
        [torch.empty(num_tokens, len(head), dtype=dtype, device=hidden.device) for _ in range(count)]
        for num_tokens in (chunk_tokens, min(scoring.block_tokens, chunk_tokens))
    )
    return chunk, scratch


def _slices(start: int, stop: int, length: int) -> Iterator[slice]:
    for begin in range(start, stop, length):
        yield slice(begin, min(begin + length, stop))


def _logits(hidden: Tensor, head: Tensor, out: Tensor) -> Tensor:
    """Write logits [n, V] to the first n rows of `out`, computed in the head's dtype."""
    hidden, out = hidden.to(head.dtype), out[: len(hidden)]
    return torch.mm(hidden, head.T, out=out) if out.dtype == head.dtype else out.copy_(hidden @ head.T)


def _target_gradient(probs: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of the target's log-prob w.r.t. the logits, in the memory of `probs`."""
    return probs.neg_().scatter_add_(-1, target, torch.ones_like(target, dtype=probs.dtype))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, computed in the dtype of `right`."""
    return left.to(right.dtype) @ right


def _add_product(total: Tensor, left: Tensor, right: Tensor, weight: float = 1.0) -> None:
    """Add weight * left @ right, computed in the dtype of `right`."""
    if total.dtype == right.dtype:
        total.addmm_(left.to(right.dtype), right, alpha=weight)
    else:
        total.add_(_product(left, right), alpha=weight)


def likeliest(student_logprobs: Float[Tensor, "*N V"], top_k: int | None) -> Int[Tensor, "*N K"] | None:
    """Return the ids of the student's top-k tokens, or None where that is the whole vocabulary."""
    if top_k is None or top_k >= student_logprobs.shape[-1]:
        return None
    return student_logprobs.detach().topk(top_k, dim=-1, sorted=False).indices


def divergence_and_gradient(
    student: Float[Tensor, "*N V"], teacher: Float[Tensor, "*N V"], alpha: Alpha
) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N V"]]:
    """Return the divergence and its gradient w.r.t. the student's log-probs."""
    if alpha == "symmetric":
        forward, forward_gradient = divergence_and_gradient(student, teacher, 0.0)
        reverse, reverse_gradient = divergence_and_gradient(student, teacher, 1.0)
        return (forward + reverse) / 2, (forward_gradient + reverse_gradient) / 2
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
    # The gradient through M cancels the + 1 that reverse KL has: only log(S / M) remains.
    return (from_student + from_teacher).sum(-1), from_student


def _log_ratio(p_probs: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return log p - log q, and 0 where p is impossible: 0 log 0 = 0."""
    return torch.where(p_probs > 0, p - q, 0.0)

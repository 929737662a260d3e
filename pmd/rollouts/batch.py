"""From verified rollouts to padded tensors.

Enters: the examples of one optimizer step (a rollout, its advantage, its teacher context). Leaves: micro-batches of at
most a given number of padded tokens, whose losses add up to the loss of the whole step, however they were split.

Rollouts of a group that share a long prompt stay together, as rows of one run, so that the prompt is computed once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from pmd.errors import AlignmentError
from pmd.models.prefixes import PrefixRun, prefix_run
from pmd.objective.reduce import token_weights
from pmd.teacher.context import TeacherContext
from pmd.types import Rollout


@dataclass(frozen=True, slots=True)
class Example:
    """One rollout as the objective sees it."""

    rollout: Rollout
    advantage: float
    context: TeacherContext

    @property
    def completion_ids(self) -> tuple[int, ...]:
        """The ids that student and teacher both score."""
        return self.rollout.completion.token_ids

    @property
    def num_padded_tokens(self) -> int:
        """Length of the longer of the student's and the teacher's sequence."""
        return max(len(self.rollout.prompt_ids), len(self.context.prompt_ids)) + len(self.completion_ids)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Right-padded prompts with completions: ids, what is real, and what is to be scored; all [B, L]."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor  # bool
    prefix_runs: Sequence[PrefixRun] = ()  # cover all rows, or empty: nothing is shared

    @property
    def completion_ids(self) -> Tensor:
        """The completion tokens, row after row: [N]."""
        return self.input_ids[self.completion_mask]

    def per_token(self, per_row: Sequence[float]) -> Tensor:
        """Repeat one value a row over the row's completion tokens: [N]."""
        lengths = self.completion_mask.sum(1)
        return torch.tensor(per_row, device=lengths.device).repeat_interleave(lengths)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, attention mask, completion mask."""
        return self.input_ids, self.attention_mask, self.completion_mask


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """How a run turns examples into tensors."""

    max_tokens: int  # padded tokens of one micro-batch
    pad_id: int
    anchor_weight: float  # distillation weight of rollouts whose teacher saw nothing extra
    reduction: Literal["token", "sequence"]
    share_prefixes: Literal["off", "teacher", "both"] = "off"


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some rollouts of a step, as tensors. N counts their completion tokens, row after row."""

    examples: tuple[Example, ...]  # B of them
    student: Sequences
    teacher: Sequences
    sampling_logprobs: Tensor  # [N], of the engine; NaN where it reported none
    advantages: Tensor  # [N], each rollout's advantage on all its tokens
    distillation_weights: Tensor  # [N]: 1 with context, objective.anchor_weight without
    token_weights: Tensor  # [N]: the weights that add up to 1 over all tokens of the step


@dataclass(frozen=True, slots=True)
class Batch:
    """All scored rollouts of one optimizer step. Unscored ones (a crashed verifier) never reach it."""

    examples: tuple[Example, ...]
    epoch: int
    step: int  # of the run, counted from 0
    metrics: dict[str, float] = field(default_factory=dict)

    def micro_batches(self, layout: BatchLayout, device: torch.device) -> Iterator[MicroBatch]:
        """Yield micro-batches of at most `layout.max_tokens` padded tokens (a longer single rollout stands alone)."""
        weights = token_weights([len(example.completion_ids) for example in self.examples], layout.reduction)
        for plan in _plans(self.examples, layout):
            examples = [self.examples[i] for i in plan.rows]
            yield _collate(examples, [weights[i] for i in plan.rows], plan, layout, device)


@dataclass(slots=True)
class _Plan:
    """One micro-batch: positions of its rollouts, row after row, and what neighbouring rows share."""

    rows: list[int] = field(default_factory=list)
    student: list[PrefixRun] = field(default_factory=list)  # cover all rows, or none
    teacher: list[PrefixRun] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, part: "_Plan") -> None:
        start = len(self.rows)
        self.rows += part.rows
        self.student += [replace(run, start=run.start + start, stop=run.stop + start) for run in part.student]
        self.teacher += [replace(run, start=run.start + start, stop=run.stop + start) for run in part.teacher]
        self.num_tokens += part.num_tokens


def _plans(examples: Sequence[Example], layout: BatchLayout) -> Iterator[_Plan]:
    """Yield the micro-batches: first the groups that share a prompt, largest first, then all other rollouts."""
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.rollout.group_id if layout.share_prefixes != "off" else str(i), []).append(i)
    parts = [part for rows in groups.values() for part in _shared_parts(examples, rows, layout)]
    plan = _Plan()
    for part in sorted(parts, key=lambda part: -part.num_tokens):
        if plan.rows and plan.num_tokens + part.num_tokens > layout.max_tokens:
            yield plan
            plan = _Plan()
        plan.add(part)
    if plan.rows:
        yield plan
    shared = {i for part in parts for i in part.rows}
    others = [i for i in range(len(examples)) if i not in shared]
    for rows in split_by_tokens([examples[i].num_padded_tokens for i in others], layout.max_tokens):
        yield _Plan([others[row] for row in rows])


def _shared_parts(examples: Sequence[Example], rows: list[int], layout: BatchLayout) -> Iterator[_Plan]:
    """Yield a group whose rollouts share a prompt, halved until each part is small enough; nothing where none pays."""
    if len(rows) == 1:
        return
    runs = []
    for side in ("student", "teacher"):
        pairs = [_pair(examples[i], side) for i in rows]
        run = prefix_run([prompt for prompt, _ in pairs], [len(prompt) + len(ids) for prompt, ids in pairs])
        shares = layout.share_prefixes == "both" or side == layout.share_prefixes
        runs.append(run if shares else replace(run, prefix=0))
    num_tokens = max(run.num_tokens for run in runs)
    if num_tokens > layout.max_tokens:
        middle = len(rows) // 2
        yield from _shared_parts(examples, rows[:middle], layout)
        yield from _shared_parts(examples, rows[middle:], layout)
    elif any(run.prefix for run in runs):
        yield _Plan(rows, [runs[0]], [runs[1]], num_tokens)


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group positions, longest first, so that rows x longest row stays within `max_tokens`."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    longest = 0
    for i in order:
        if not groups or (len(groups[-1]) + 1) * longest > max_tokens:
            groups.append([])
            longest = lengths[i]
        groups[-1].append(i)
    return groups


def _pair(example: Example, side: str) -> tuple[Sequence[int], Sequence[int]]:
    """Return the prompt of the student or of the teacher, and the completion."""
    prompt_ids = example.rollout.prompt_ids if side == "student" else example.context.prompt_ids
    return prompt_ids, example.completion_ids


def _collate(
    examples: list[Example], weights: list[float], plan: _Plan, layout: BatchLayout, device: torch.device
) -> MicroBatch:
    student = pad_sequences([_pair(e, "student") for e in examples], layout.pad_id, device)
    teacher = pad_sequences([_pair(e, "teacher") for e in examples], layout.pad_id, device)
    student, teacher = replace(student, prefix_runs=plan.student), replace(teacher, prefix_runs=plan.teacher)
    if not torch.equal(student.completion_ids, teacher.completion_ids):
        raise AlignmentError("student and teacher would score different completion tokens.")
    distils = [1.0 if e.context.shows_anything else layout.anchor_weight for e in examples]
    logprobs = [torch.nan if p is None else p for e in examples for p in e.rollout.completion.logprobs]
    return MicroBatch(
        examples=tuple(examples),
        student=student,
        teacher=teacher,
        sampling_logprobs=torch.tensor(logprobs, device=device),
        advantages=student.per_token([e.advantage for e in examples]),
        distillation_weights=student.per_token(distils),
        token_weights=student.per_token(weights),
    )


def pad_sequences(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, device: torch.device) -> Sequences:
    """Right-pad (prompt ids, completion ids) pairs to one length."""
    longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids = torch.full((len(pairs), longest), pad_id)
    attention = torch.zeros(len(pairs), longest, dtype=torch.long)
    completion_mask = torch.zeros(len(pairs), longest, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(pairs):
        start, end = len(prompt), len(prompt) + len(completion)
        ids[row, :end] = torch.tensor([*prompt, *completion])
        attention[row, :end] = 1
        completion_mask[row, start:end] = True
    return Sequences(ids.to(device), attention.to(device), completion_mask.to(device))

"""From verified rollouts to padded tensors.

Enters: the examples of one optimizer step (a rollout, its advantage, its teacher context). Leaves: micro-batches of at
most a given number of padded tokens, whose losses add up to the loss of the whole step, however they were split.

Rollouts of a group that share a long prompt stay together, so that the prompt is computed once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pmd.errors import AlignmentError
from pmd.models.sequences import Pair, Sequences, pad_after_prefixes, pad_sequences
from pmd.objective.reduce import token_weights
from pmd.rollouts.micro_batches import Row, Splitter, sharing_pays
from pmd.teacher.context import TeacherContext
from pmd.types import Rollout

SIDES = ("student", "teacher")


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


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """How a run turns examples into tensors."""

    max_tokens: int  # padded tokens of one micro-batch
    pad_id: int
    anchor_weight: float  # distillation weight of rollouts whose teacher saw nothing extra
    reduction: Literal["token", "sequence"]
    shared: frozenset[str] = frozenset()  # sides whose prompts are computed once for a group, where it pays
    packs: bool = False  # whether models take rows without padding between them


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
        """Yield micro-batches of at most `layout.max_tokens` tokens with padding (a longer rollout stands alone)."""
        weights = token_weights([len(example.completion_ids) for example in self.examples], layout.reduction)
        pairs = {side: [_pair(example, side) for example in self.examples] for side in SIDES}
        groups = self._groups()
        shared = {side for side in layout.shared if sharing_pays([[pairs[side][i] for i in rows] for rows in groups])}
        for rows in Splitter(pairs, shared, layout.max_tokens, layout.packs).split(groups):
            padded = {side: _padded(pairs[side], rows, side in shared, layout.pad_id, device) for side in SIDES}
            chosen = [(self.examples[row.rollout], weights[row.rollout]) for row in rows]
            yield _collate([e for e, _ in chosen], [weight for _, weight in chosen], padded, layout)

    def _groups(self) -> list[list[int]]:
        """Return the positions of each group's rollouts."""
        groups: dict[str, list[int]] = {}
        for i, example in enumerate(self.examples):
            groups.setdefault(example.rollout.group_id, []).append(i)
        return list(groups.values())


def _pair(example: Example, side: str) -> Pair:
    """Return the prompt of the student or of the teacher, and the completion."""
    prompt_ids = example.rollout.prompt_ids if side == "student" else example.context.prompt_ids
    return prompt_ids, example.completion_ids


def _padded(pairs: Sequence[Pair], rows: Sequence[Row], shares: bool, pad_id: int, device: torch.device) -> Sequences:
    """Pad one side of a micro-batch, whole if no two of its rows could share a prompt."""
    chosen, groups = [pairs[row.rollout] for row in rows], [row.group for row in rows]
    if shares and len(set(groups)) < len(groups):
        return pad_after_prefixes(chosen, groups, pad_id, device)
    return pad_sequences(chosen, pad_id, device)


def _collate(
    examples: list[Example], weights: list[float], padded: dict[str, Sequences], layout: BatchLayout
) -> MicroBatch:
    student, teacher = padded["student"], padded["teacher"]
    if not torch.equal(student.completion_ids, teacher.completion_ids):
        raise AlignmentError("student and teacher would score different completion tokens.")
    distils = [1.0 if e.context.shows_anything else layout.anchor_weight for e in examples]
    logprobs = [torch.nan if p is None else p for e in examples for p in e.rollout.completion.logprobs]
    return MicroBatch(
        examples=tuple(examples),
        student=student,
        teacher=teacher,
        sampling_logprobs=torch.tensor(logprobs, device=student.input_ids.device),
        advantages=student.per_token([e.advantage for e in examples]),
        distillation_weights=student.per_token(distils),
        token_weights=student.per_token(weights),
    )

"""Turns verified rollouts into tensors: micro-batches, padded or packed, and prompts shared within a group.

A `Batch` holds the examples of one optimizer step. Its micro-batches hold at most a given number of tokens each, and
their losses add up to the loss of the whole step, however it was split: every token's weight is fixed beforehand.
Rows of similar length are padded together. Rollouts of a group that share a long prompt stay together, so that the
models compute it once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from pmd.errors import AlignmentError
from pmd.losses.reduce import token_weights
from pmd.packing import MIN_PREFIX, PackedSequences, moved, pack
from pmd.teacher import TeacherContext
from pmd.types import Rollout

Pair = tuple[Sequence[int], Sequence[int]]  # prompt ids, completion ids
SIDES = ("student", "teacher")
#: Rows are split into several forward passes if each extra pass saves at least this many padding tokens.
MIN_SAVED_PADDING = 256
#: Sharing pays if it saves at least this many tokens of a step (two passes cost more overhead than one) ...
MIN_SAVED_TOKENS = 256
#: ... and this share of them (keys and values are copied for every row).
MIN_SAVED_SHARE = 0.25
#: Each row has a copy of its prefix's keys and values; this many copied tokens take the memory of one computed token.
TOKENS_PER_COPY = 8
#: Without gradient, a token takes less than this share of the memory that it takes with one, layers recomputed or not.
TEACHER_TOKEN_MEMORY = 0.5

#: One pass over all rows and columns.
WHOLE = ((slice(None), slice(None)),)


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
    no_context_weight: float  # distillation weight of rollouts whose teacher saw nothing extra
    reduction: Literal["token", "sequence"]
    shared: frozenset[str] = frozenset()  # sides whose prompts are computed once per group, where that pays off
    packs: bool = False  # whether rows are packed behind one another instead of padded (packing.py)
    rank: int = 0  # of a run on several devices: which of the groups this process computes
    num_ranks: int = 1
    in_step: bool = False  # whether all ranks must make the same passes, because each holds only a part of the weights


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """The shared beginnings of P prompts, left-padded: [P, W]; row b of a batch continues prefix `of_row[b]`."""

    input_ids: Tensor
    attention_mask: Tensor
    of_row: Tensor  # [B]


@dataclass(frozen=True, slots=True)
class Sequences:
    """Padded prompts with completions: ids, attention mask and completion mask; all [B, L].

    Rows are right-padded where there are prefixes or several passes.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor  # bool
    prefixes: SharedPrefixes | None = None  # what precedes the rows, where prompts are shared
    passes: tuple[tuple[slice, slice], ...] = WHOLE  # (rows, columns) that hold all real tokens

    @property
    def completion_ids(self) -> Tensor:
        """The completion tokens, row after row: [N]."""
        return self.input_ids[self.completion_mask]

    @property
    def num_real_tokens(self) -> int:
        """Tokens that the model computes, without padding; a shared prefix counts once."""
        before = 0 if self.prefixes is None else int(self.prefixes.attention_mask.sum())
        return before + int(self.attention_mask.sum())

    def per_token(self, per_row: Sequence[float]) -> Tensor:
        """Repeat each row's value over the row's completion tokens: [N]."""
        lengths = self.completion_mask.sum(1)
        return torch.tensor(per_row, device=lengths.device).repeat_interleave(lengths)


@dataclass(frozen=True, slots=True)
class CompletionTokens:
    """What the objective needs for each completion token besides its scores; all [N], row after row."""

    sampling_logprobs: Tensor  # of the engine, in nats; NaN where it reported none
    policy_versions: Tensor  # of the weights that sampled the token
    advantages: Tensor  # each rollout's advantage on all its tokens
    distillation_weights: Tensor  # 1 with context, objective.no_context_weight without
    token_weights: Tensor  # add up to 1 over all tokens of the step


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some rollouts of a step, as tensors. N counts their completion tokens, row after row."""

    examples: tuple[Example, ...]  # B of them
    student: Sequences | PackedSequences
    teacher: Sequences | PackedSequences
    tokens: CompletionTokens


@dataclass(frozen=True, slots=True)
class Batch:
    """All scored rollouts of one optimizer step. Unscored ones (a crashed verifier) never reach it."""

    examples: tuple[Example, ...]
    epoch: int
    step: int  # of the run, counted from 0
    metrics: dict[str, float] = field(default_factory=dict)
    is_last: bool = True  # of the optimizer steps of its rollout batch

    def micro_batches(self, layout: BatchLayout, device: torch.device) -> Iterator[MicroBatch]:
        """Yield micro-batches of at most `layout.max_tokens` tokens, padding included; a longer rollout has its own.

        Those of all ranks together hold every rollout once, with the weights that it has in the whole step. Ranks that
        keep in step have equally many; what is missing is filled up with micro-batches of no weight and no examples.
        """
        weights = token_weights([len(example.completion_ids) for example in self.examples], layout.reduction)
        pairs = {side: [_pair(example, side) for example in self.examples] for side in SIDES}
        groups = self._groups()
        shared = set(layout.shared)
        if not layout.packs:  # packed rows lose nothing by sharing
            shared = {side for side in shared if sharing_pays([[pairs[side][i] for i in rows] for rows in groups])}
        lengths = [sum(sum(map(len, pairs[side][i])) for i in rows for side in SIDES) for rows in groups]
        shares = [[groups[i] for i in share] for share in balanced(lengths, layout.num_ranks)]
        splitter = Splitter(pairs, shared, layout.max_tokens, layout.packs)
        num_made = 0
        for rows in splitter.split(shares[layout.rank]):
            chosen = [(self.examples[row.rollout], weights[row.rollout]) for row in rows]
            sides = {side: _sequences(pairs[side], rows, side in shared, layout, device) for side in SIDES}
            micro_batch = _collate([e for e, _ in chosen], [weight for _, weight in chosen], sides, layout)
            yield moved(micro_batch, device) if layout.packs else micro_batch
            num_made += 1
        if layout.in_step:
            most = max(sum(1 for _ in splitter.split(share)) for share in shares)
            for _ in range(most - num_made):
                filler = self._filler(pairs, layout, device)
                yield moved(filler, device) if layout.packs else filler

    def _filler(self, pairs: Mapping[str, Sequence[Pair]], layout: BatchLayout, device: torch.device) -> MicroBatch:
        """Return the step's shortest rollout without any weight: it adds nothing to losses, gradients and counts."""
        shortest = min(range(len(self.examples)), key=lambda i: sum(sum(map(len, pairs[side][i])) for side in SIDES))
        sides = {side: _sequences(pairs[side], [Row(shortest, 0)], False, layout, device) for side in SIDES}
        filler = _collate([self.examples[shortest]], [0.0], sides, layout)
        known = torch.zeros_like(filler.tokens.sampling_logprobs)
        return replace(filler, examples=(), tokens=replace(filler.tokens, sampling_logprobs=known))

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with its completion, the student's or the teacher's."""
        return max(sum(map(len, _pair(example, side))) for example in self.examples for side in SIDES)

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


def _sequences(
    pairs: Sequence[Pair], rows: Sequence[Row], shares: bool, layout: BatchLayout, device: torch.device
) -> Sequences | PackedSequences:
    """Pack one side of a micro-batch, on the CPU, or pad it; rows stay whole if no two of them could share a prompt."""
    chosen, groups = [pairs[row.rollout] for row in rows], [row.group for row in rows]
    if layout.packs:
        return pack_rows(chosen, groups, shares)
    if shares and len(set(groups)) < len(groups):
        return pad_after_prefixes(chosen, groups, layout.pad_id, device)
    sequences = pad_sequences(chosen, layout.pad_id, device)
    return replace(sequences, passes=WHOLE) if layout.in_step else sequences


def pack_rows(pairs: Sequence[Pair], groups: Sequence[int], shares: bool) -> PackedSequences:
    """Pack rows on the CPU, the beginning that a group's prompts have in common only once if `shares`.

    Args:
        groups: each row's group index, from 0 without gaps.
    """
    prompts: list[list[Sequence[int]]] = [[] for _ in range(max(groups) + 1)]
    for (prompt, _), group in zip(pairs, groups, strict=True):
        prompts[group].append(prompt)
    lengths = [common_length(members) if shares and len(members) > 1 else 0 for members in prompts]
    return pack(pairs, [length if length >= MIN_PREFIX else 0 for length in lengths], groups)


def _collate(
    examples: list[Example],
    weights: list[float],
    sides: dict[str, Sequences | PackedSequences],
    layout: BatchLayout,
) -> MicroBatch:
    student, teacher = sides["student"], sides["teacher"]
    if not torch.equal(student.completion_ids, teacher.completion_ids):
        raise AlignmentError("student and teacher would score different completion tokens.")
    completions = [example.rollout.completion for example in examples]
    logprobs = [torch.nan if p is None else p for completion in completions for p in completion.logprobs]
    tokens = CompletionTokens(
        sampling_logprobs=torch.tensor(logprobs, device=student.input_ids.device),
        policy_versions=student.per_token([completion.policy_version for completion in completions]),
        advantages=student.per_token([e.advantage for e in examples]),
        distillation_weights=student.per_token(
            [1.0 if e.context.shows_anything else layout.no_context_weight for e in examples]
        ),
        token_weights=student.per_token(weights),
    )
    return MicroBatch(tuple(examples), student, teacher, tokens)


@dataclass(frozen=True, slots=True)
class Size:
    """The size of one forward pass: prefixes padded to the longest prefix, then rows padded to the longest row."""

    prefixes: int
    prefix: int
    rows: int
    row: int
    real: int  # tokens without padding

    def __add__(self, other: Size) -> Size:
        return Size(
            self.prefixes + other.prefixes,
            max(self.prefix, other.prefix),
            self.rows + other.rows,
            max(self.row, other.row),
            self.real + other.real,
        )

    def num_tokens(self, packs: bool) -> int:
        """Return the tokens of the forward pass, padding included."""
        if packs:
            return self.real
        copies = self.rows * self.prefix // TOKENS_PER_COPY
        return self.prefixes * self.prefix + self.rows * self.row + copies


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a micro-batch."""

    rollout: int  # position among the step's rollouts
    group: int  # index of its group within the micro-batch, from 0 without gaps


@dataclass(frozen=True, slots=True)
class Splitter:
    """Splits the rollouts of a step into micro-batches. A side is `student` or `teacher`."""

    pairs: Mapping[str, Sequence[Pair]]  # by side, one for each rollout
    shared: Collection[str]  # sides whose groups share their prompts' beginnings
    max_tokens: int
    packs: bool

    def split(self, groups: Sequence[list[int]]) -> Iterator[list[Row]]:
        """Yield micro-batches, the longest completion first. A single rollout above the limit gets its own."""
        units = [unit for group in groups for unit in self._units(group)]
        batch: list[list[int]] = []
        sizes: list[Size] = []
        for unit in sorted(units, key=lambda unit: [-size.row for size in self._sizes(unit)]):
            added = self._sizes(unit)
            joined = [a + b for a, b in zip(sizes, added, strict=True)] if batch else added
            if batch and self._num_tokens(joined) > self.max_tokens:
                yield self._rows(batch)
                batch, joined = [], added
            batch.append(unit)
            sizes = joined
        if batch:
            yield self._rows(batch)

    def _rows(self, units: Sequence[list[int]]) -> list[Row]:
        rows = [Row(i, number) for number, unit in enumerate(units) for i in unit]
        return sorted(rows, key=lambda row: -len(self.pairs["student"][row.rollout][1]))

    def _units(self, group: list[int]) -> Iterator[list[int]]:
        """Yield what must stay together: single rollouts if nothing is shared, else the group, halved until it fits."""
        fits = self._num_tokens(self._sizes(group)) <= self.max_tokens
        if len(group) == 1 or (self.shared and fits):
            yield group
        else:
            group = sorted(group, key=lambda i: -sum(len(part) for part in self.pairs["student"][i]))
            yield from self._units(group[: len(group) // 2])
            yield from self._units(group[len(group) // 2 :])

    def _sizes(self, group: list[int]) -> list[Size]:
        return [group_size([pairs[i] for i in group], side in self.shared) for side, pairs in self.pairs.items()]

    def _num_tokens(self, sizes: Sequence[Size]) -> int:
        """Return the tokens that count: the larger side's, but half of the teacher's if rows are packed."""
        tokens = {side: size.num_tokens(self.packs) for side, size in zip(self.pairs, sizes, strict=True)}
        if self.packs and "teacher" in tokens:
            tokens["teacher"] = math.ceil(tokens["teacher"] * TEACHER_TOKEN_MEMORY)
        return max(tokens.values())


def group_size(group: Sequence[Pair], shares: bool) -> Size:
    """Return the size of the forward pass over one group's rollouts."""
    cut = common_length([prompt for prompt, _ in group]) if shares else 0
    lengths = [len(prompt) + len(completion) - cut for prompt, completion in group]
    return Size(1, cut, len(group), max(lengths), cut + sum(lengths))


def sharing_pays(groups: Sequence[Sequence[Pair]]) -> bool:
    """Whether sharing each group's common prompt prefix saves enough of the step's tokens.

    False if a group has no common prefix: a model cannot compute an empty one.
    """
    cuts = [common_length([prompt for prompt, _ in group]) for group in groups]
    saved = sum((len(group) - 1) * cut for group, cut in zip(groups, cuts, strict=True))
    total = sum(len(prompt) + len(completion) for group in groups for prompt, completion in group)
    return min(cuts, default=0) > 0 and saved >= max(MIN_SAVED_TOKENS, MIN_SAVED_SHARE * total)


def balanced(sizes: Sequence[int], num_parts: int) -> list[list[int]]:
    """Divide positions into parts of about the same total size: each, the largest first, into the smallest part."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    totals = [0] * num_parts
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        smallest = totals.index(min(totals))
        parts[smallest].append(i)
        totals[smallest] += sizes[i]
    return [sorted(part) for part in parts]


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group positions, longest first, so that number of rows x longest row stays within `max_tokens`."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    longest = 0
    for i in order:
        if not groups or (len(groups[-1]) + 1) * longest > max_tokens:
            groups.append([])
            longest = lengths[i]
        groups[-1].append(i)
    return groups


def pad_sequences(pairs: Sequence[Pair], pad_id: int, device: torch.device) -> Sequences:
    """Right-pad whole rows to one length."""
    lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
    ids = torch.full((len(pairs), max(lengths)), pad_id)
    attention = torch.zeros(ids.shape, dtype=torch.long)
    completion_mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(pairs):
        start, end = len(prompt), lengths[row]
        ids[row, :end] = torch.tensor([*prompt, *completion])
        attention[row, :end] = 1
        completion_mask[row, start:end] = True
    return Sequences(ids.to(device), attention.to(device), completion_mask.to(device), passes=tuple(passes(lengths)))


def pad_after_prefixes(pairs: Sequence[Pair], groups: Sequence[int], pad_id: int, device: torch.device) -> Sequences:
    """Pad rows after splitting off the common prefix of each group's prompts.

    Args:
        groups: each row's group index, from 0 without gaps; the prompts of a group have a `common_length` > 0.
    """
    members: list[list[Sequence[int]]] = [[] for _ in range(max(groups) + 1)]
    for (prompt, _), group in zip(pairs, groups, strict=True):
        members[group].append(prompt)
    cuts = [common_length(prompts) for prompts in members]
    width = max(cuts)
    ids = torch.full((len(members), width), pad_id)
    real = torch.zeros(ids.shape, dtype=torch.long)
    for row, (prompts, cut) in enumerate(zip(members, cuts, strict=True)):
        ids[row, width - cut :] = torch.tensor(prompts[0][:cut])
        real[row, width - cut :] = 1
    prefixes = SharedPrefixes(ids.to(device), real.to(device), torch.tensor(groups, device=device))
    rest = [(prompt[cuts[group] :], completion) for (prompt, completion), group in zip(pairs, groups, strict=True)]
    return replace(pad_sequences(rest, pad_id, device), prefixes=prefixes)


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return the length of the common prefix, excluding each prompt's last token, which predicts the completion."""
    common, first = min(len(prompt) for prompt in prompts) - 1, prompts[0]
    for prompt in prompts[1:]:
        if prompt[:common] != first[:common]:
            common = next(i for i in range(common) if prompt[i] != first[i])
    return common


def passes(lengths: Sequence[int], start: int = 0) -> list[tuple[slice, slice]]:
    """Split rows of `lengths`, longest first, into (rows, columns) blocks where that saves enough padding."""
    longest, rest, saved = max(lengths), 0, {}
    for row in range(len(lengths) - 1, 0, -1):
        rest = max(rest, lengths[row])
        saved[row] = (longest - rest) * (len(lengths) - row)  # if the rows from here on get a pass of their own
    row = max(saved, key=saved.__getitem__, default=0)
    if not row or saved[row] < MIN_SAVED_PADDING:
        return [(slice(start, start + len(lengths)), slice(longest))]
    return [*passes(lengths[:row], start), *passes(lengths[row:], start + row)]

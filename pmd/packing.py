"""Packs the rows of a micro-batch behind one another, without padding; a prompt that rows share is there once.

Everything is built on the CPU and moved to the device at once, so that nothing waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pmd.attention import PackedLayout, SharedLayout
from pmd.attention_kernels import Segments

Record = TypeVar("Record")
#: A shared beginning of fewer tokens is left in each row.
MIN_PREFIX = 16


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """Prompts with completions as T packed tokens, laid out as `attention.py` describes."""

    input_ids: Tensor  # [T]
    position_ids: Tensor  # [T], those of a row go on where its prefix ends
    predicts: Tensor  # [N], where the tokens before each completion token are, row after row
    completion_ids: Tensor  # [N]
    completion_lengths: tuple[int, ...]  # of each row; they add up to N
    layout: PackedLayout

    @property
    def num_real_tokens(self) -> int:
        """Tokens that the model computes; a shared prefix counts once."""
        return len(self.input_ids)

    def per_token(self, per_row: Sequence[float]) -> Tensor:
        """Repeat each row's value over the row's completion tokens: [N]."""
        lengths = torch.tensor(self.completion_lengths)
        return torch.tensor(per_row).repeat_interleave(lengths).to(self.input_ids.device)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens that attend to each other, and to the prefix that they continue."""

    ids: Sequence[int]
    start: int  # position of the first token
    prefix: int | None = None  # index of the prefix


def pack(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], prefix_lengths: Sequence[int], groups: Sequence[int]
) -> PackedSequences:
    """Pack prompts with completions, on the CPU.

    Args:
        pairs: prompt ids and completion ids of each row.
        prefix_lengths: for each group, how many tokens all its prompts begin with and are to be there once; 0 for none.
        groups: each row's group.
    """
    shared = [g for g, length in enumerate(prefix_lengths) if length]
    first = {group: prompt for (prompt, _), group in zip(reversed(pairs), reversed(groups), strict=True)}
    prefixes = [_Piece(first[group][: prefix_lengths[group]], 0) for group in shared]
    rows = []
    for (prompt, completion), group in zip(pairs, groups, strict=True):
        cut = prefix_lengths[group]
        rows.append(_Piece([*prompt[cut:], *completion], cut, shared.index(group) if cut else None))
    whole = [i for i, row in enumerate(rows) if row.prefix is None]
    after = sorted((i for i, row in enumerate(rows) if row.prefix is not None), key=lambda i: rows[i].prefix or 0)
    pieces = [*(rows[i] for i in whole), *prefixes, *(rows[i] for i in after)]
    starts = [0, *accumulate(len(piece.ids) for piece in pieces)]
    place = dict(zip([*whole, *(None for _ in prefixes), *after], starts[:-1], strict=True))
    predicts = []
    for i, (_, completion) in enumerate(pairs):
        end = place[i] + len(rows[i].ids)
        predicts.append(torch.arange(end - len(completion) - 1, end - 1))
    return PackedSequences(
        input_ids=torch.tensor([token for piece in pieces for token in piece.ids]),
        position_ids=torch.cat([torch.arange(piece.start, piece.start + len(piece.ids)) for piece in pieces]),
        predicts=torch.cat(predicts),
        completion_ids=torch.tensor([token for _, completion in pairs for token in completion]),
        completion_lengths=tuple(len(completion) for _, completion in pairs),
        layout=_layout(pieces, len(whole), len(prefixes)),
    )


def _layout(pieces: Sequence[_Piece], num_whole: int, num_prefixes: int) -> PackedLayout:
    """Return which tokens attend to which. The pieces are whole rows, prefixes, and rows that continue a prefix."""
    lengths = [len(piece.ids) for piece in pieces]
    own, longest = _segments(lengths), max(piece.start + len(piece.ids) for piece in pieces)
    if not num_prefixes:
        return PackedLayout(own, longest)
    prefixes, rows = lengths[num_whole:][:num_prefixes], lengths[num_whole + num_prefixes :]
    queries, index, keys = [0] * num_prefixes, [], []
    starts = [0, *accumulate(lengths)]
    for piece, start, length in zip(pieces, starts, lengths, strict=False):
        parts = [torch.arange(start, start + length)]
        if piece.prefix is not None:
            queries[piece.prefix] += length
            before = starts[num_whole + piece.prefix]
            parts.insert(0, torch.arange(before, before + prefixes[piece.prefix]))
        index += parts
        keys.append(sum(map(len, parts)))
    shared = SharedLayout(
        sum(prefixes), sum(rows), _segments(queries), _segments(prefixes), torch.cat(index), _segments(keys)
    )
    return PackedLayout(own, longest, shared)


def _segments(lengths: Sequence[int]) -> Segments:
    return Segments(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), tuple(lengths))


def moved(record: Record, device: torch.device) -> Record:
    """Return a dataclass with its tensors, and those of dataclasses in it, on the device; a GPU is not waited for."""
    whole, changes = cast(Any, record), {}
    for field in fields(whole):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = _on_device(value, device)
        elif is_dataclass(value) and not isinstance(value, type):
            changes[field.name] = moved(value, device)
    return replace(whole, **changes)


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

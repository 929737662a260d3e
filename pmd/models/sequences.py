"""From prompts and completions to padded tensors.

Enters: (prompt ids, completion ids) pairs. Leaves: `Sequences`, whole, or with the beginnings of prompts that several
rows share taken out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Pair = tuple[Sequence[int], Sequence[int]]  # prompt ids, completion ids

#: Rows are given to a model in several passes if that saves at least this many tokens of padding a pass.
LEAST_SAVED_PADDING = 256


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Beginnings of P prompts, padded on the left: [P, W]; row b of a batch goes on from prefix `of_row[b]`."""

    input_ids: Tensor
    attention_mask: Tensor
    of_row: Tensor  # [B]


@dataclass(frozen=True, slots=True)
class Sequences:
    """Padded prompts with completions: ids, what is real, and what is to be scored; all [B, L].

    With prefixes or with passes, rows are padded on the right.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor  # bool
    prefixes: SharedPrefixes | None = None  # what stands before the rows, if they are not whole
    passes: tuple[tuple[slice, slice], ...] = ((slice(None), slice(None)),)  # rows, columns; all that is real is there

    @property
    def completion_ids(self) -> Tensor:
        """The completion tokens, row after row: [N]."""
        return self.input_ids[self.completion_mask]

    @property
    def num_real_tokens(self) -> int:
        """Tokens that a model is given, without padding; a shared prefix counts once."""
        before = 0 if self.prefixes is None else int(self.prefixes.attention_mask.sum())
        return before + int(self.attention_mask.sum())

    def per_token(self, per_row: Sequence[float]) -> Tensor:
        """Repeat one value a row over the row's completion tokens: [N]."""
        lengths = self.completion_mask.sum(1)
        return torch.tensor(per_row, device=lengths.device).repeat_interleave(lengths)


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
    """Pad rows, and take out what the prompts of each group begin with.

    Args:
        groups: the number of each row's group, from 0 without gaps; the prompts of a group have a `common_length` > 0.
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
    """Return how many ids all prompts begin with; the last of the shortest is left to stand before what is scored."""
    common, first = min(len(prompt) for prompt in prompts) - 1, prompts[0]
    for prompt in prompts[1:]:
        if prompt[:common] != first[:common]:
            common = next(i for i in range(common) if prompt[i] != first[i])
    return common


def passes(lengths: Sequence[int], start: int = 0) -> list[tuple[slice, slice]]:
    """Divide rows of `lengths`, the longest first, where rows and columns that hold them save enough padding."""
    longest, rest, saved = max(lengths), 0, {}
    for row in range(len(lengths) - 1, 0, -1):
        rest = max(rest, lengths[row])
        saved[row] = (longest - rest) * (len(lengths) - row)  # if the rows from here on stand by themselves
    row = max(saved, key=saved.__getitem__, default=0)
    if not row or saved[row] < LEAST_SAVED_PADDING:
        return [(slice(start, start + len(lengths)), slice(longest))]
    return [*passes(lengths[:row], start), *passes(lengths[row:], start + row)]

"""Which rollouts go through the models together.

Enters: prompt and completion of each rollout as student and teacher see them, and a bound on the tokens of one forward
pass. Leaves: rows, micro-batch by micro-batch. Rows of like length stand together; where the prompt that a group shares
is computed once, the group stays together, too.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pmd.models.sequences import Pair, common_length

#: Sharing pays if it saves at least this many tokens of a step (two passes cost more overhead than one) ...
LEAST_SAVED_TOKENS = 256
#: ... and this share of them (keys and values are copied for every row).
LEAST_SAVED_SHARE = 0.25
#: Each row has its own copy of its prefix's keys and values: this many such tokens take the memory of one computed.
TOKENS_PER_COPY = 8


@dataclass(frozen=True, slots=True)
class Size:
    """What one model is given: prefixes, each padded to the longest, then rows, each padded to the longest."""

    prefixes: int
    prefix: int
    rows: int
    row: int
    real: int  # tokens without padding

    def __add__(self, other: "Size") -> "Size":
        return Size(
            self.prefixes + other.prefixes,
            max(self.prefix, other.prefix),
            self.rows + other.rows,
            max(self.row, other.row),
            self.real + other.real,
        )

    def num_tokens(self, packs: bool) -> int:
        """Return the tokens of the forward pass; whole rows may be packed without padding."""
        if packs and not self.prefix:
            return self.real
        copies = self.rows * self.prefix // TOKENS_PER_COPY
        return self.prefixes * self.prefix + self.rows * self.row + copies


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a micro-batch."""

    rollout: int  # position among the step's rollouts
    group: int  # number of its group within the micro-batch, from 0 without gaps


@dataclass(frozen=True, slots=True)
class Splitter:
    """Splits the rollouts of a step. A side is `student` or `teacher`."""

    pairs: Mapping[str, Sequence[Pair]]  # by side, one for each rollout
    shared: Collection[str]  # sides whose groups share their prompts' beginnings
    max_tokens: int
    packs: bool  # whether whole rows are given without padding

    def split(self, groups: Sequence[list[int]]) -> Iterator[list[Row]]:
        """Yield micro-batches, the longest completion first. A single rollout above the bound stands alone."""
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
        return max(size.num_tokens(self.packs) for size in sizes)


def group_size(group: Sequence[Pair], shares: bool) -> Size:
    """Return what a model is given for the rollouts of one group."""
    cut = common_length([prompt for prompt, _ in group]) if shares else 0
    lengths = [len(prompt) + len(completion) - cut for prompt, completion in group]
    return Size(1, cut, len(group), max(lengths), cut + sum(lengths))


def sharing_pays(groups: Sequence[Sequence[Pair]]) -> bool:
    """Whether enough of a step's tokens are saved if the rollouts of each group share what their prompts begin with.

    False where a prompt has no beginning to take out: a model cannot be given an empty one.
    """
    cuts = [common_length([prompt for prompt, _ in group]) for group in groups]
    saved = sum((len(group) - 1) * cut for group, cut in zip(groups, cuts, strict=True))
    total = sum(len(prompt) + len(completion) for group in groups for prompt, completion in group)
    return min(cuts, default=0) > 0 and saved >= max(LEAST_SAVED_TOKENS, LEAST_SAVED_SHARE * total)


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

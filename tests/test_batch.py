"""A step's rollouts in micro-batches: each in exactly one, within the bound, groups together where they share."""

import random

import pytest
from examples import CPU, make_example, make_rollout, random_ids

from pmd.batch import (
    Batch,
    BatchLayout,
    Example,
    Sequences,
    Size,
    common_length,
    group_size,
    sharing_pays,
    split_by_tokens,
)  # fmt: skip
from pmd.packing import PackedSequences

SHARED = {"off": (), "teacher": ("teacher",), "both": ("student", "teacher")}


def group_of(draw: random.Random, group: int, rows: int, shared: int) -> list[Example]:
    """Rollouts of one student prompt, and of teacher prompts that differ in their last few tokens."""
    prompt, shown, made = random_ids(draw, shared), random_ids(draw, shared + 30), []
    for number in range(rows):
        completion = random_ids(draw, draw.randrange(1, 20))
        rollout = make_rollout(100 * group + number, completion, group=group, prompt_ids=prompt)
        made.append(make_example(rollout, shown + random_ids(draw, draw.randrange(5)), success=None))
    return made


@pytest.mark.parametrize("share", ["off", "teacher", "both"])
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("max_tokens", [100, 900, 2500, 100_000])
def test_every_rollout_is_in_one_micro_batch_and_its_rows_are_its_own(share, packs, max_tokens):
    draw = random.Random(1)
    examples = [*group_of(draw, 0, 8, 300), *group_of(draw, 1, 2, 30), *group_of(draw, 2, 6, 400)]
    draw.shuffle(examples)
    layout = BatchLayout(max_tokens, 0, 1.0, "token", frozenset(SHARED[share]), packs)
    seen, with_prefix = [], {"student": 0, "teacher": 0}
    for micro_batch in Batch(tuple(examples), 0, 0).micro_batches(layout, CPU):
        seen += [e.rollout.rollout_id for e in micro_batch.examples]
        for side in ("student", "teacher"):
            sequences = getattr(micro_batch, side)
            with_prefix[side] += num_rows_with_prefix(sequences, len(micro_batch.examples))
            for row, example in enumerate(micro_batch.examples):
                prompt = example.rollout.prompt_ids if side == "student" else example.context.prompt_ids
                assert whole_row(sequences, row) == [*prompt, *example.completion_ids]
            assert sequences.completion_ids.tolist() == [t for e in micro_batch.examples for t in e.completion_ids]
            if len(micro_batch.examples) > 1:
                assert num_computed(sequences) <= max_tokens * (2 if packs and side == "teacher" else 1)
    assert sorted(seen) == sorted(e.rollout.rollout_id for e in examples)
    if max_tokens == 100_000:  # smaller bounds split groups until there is nothing left to share
        assert with_prefix == {side: 16 if side in SHARED[share] else 0 for side in with_prefix}


def num_rows_with_prefix(sequences: Sequences | PackedSequences, num_rows: int) -> int:
    if isinstance(sequences, PackedSequences):
        shared = sequences.layout.shared
        return 0 if shared is None else sum(len(prefix_of(sequences, i)) > 0 for i in range(num_rows))
    return num_rows * (sequences.prefixes is not None)


def num_computed(sequences: Sequences | PackedSequences) -> int:
    """Tokens of the forward pass, padding included."""
    if isinstance(sequences, PackedSequences) or sequences.prefixes is None:
        return sequences.input_ids.numel()
    return sequences.input_ids.numel() + sequences.prefixes.input_ids.numel()


def whole_row(sequences: Sequences | PackedSequences, row: int) -> list[int]:
    """The ids of one row as a model sees them, its prefix included."""
    if isinstance(sequences, PackedSequences):
        own = own_segment(sequences, row)
        assert sequences.position_ids[own][0] == len(prefix_of(sequences, row))
        return [*prefix_of(sequences, row), *sequences.input_ids[own].tolist()]
    real = sequences.attention_mask[row].bool()
    after = sequences.input_ids[row][real].tolist()
    if sequences.prefixes is None:
        return after
    prefix = sequences.prefixes.of_row[row]
    return sequences.prefixes.input_ids[prefix][sequences.prefixes.attention_mask[prefix].bool()].tolist() + after


def own_segment(sequences: PackedSequences, row: int) -> slice:
    """Where the row lies, which is where the states lie that predict its completion."""
    place = int(sequences.predicts[sum(sequences.completion_lengths[:row])])
    return next(own for own in sequences.layout.own.slices() if own.start <= place < own.stop)


def prefix_of(sequences: PackedSequences, row: int) -> list[int]:
    """The ids of the prefix that the row continues, by the keys that it sees before its own."""
    if sequences.layout.shared is None:
        return []
    place = sequences.layout.own.slices().index(own := own_segment(sequences, row))
    seen = sequences.layout.shared.key_index[sequences.layout.shared.keys.slices()[place]]
    return sequences.input_ids[seen[: len(seen) - (own.stop - own.start)]].tolist()


def test_sharing_must_save_enough():
    long = tuple(range(700))
    assert sharing_pays([[(long, (1,)), (long, (2,))]])
    assert not sharing_pays([[(long[:250], (1,)), (long[:250], (2,))]]), "249 tokens saved are too few"
    assert sharing_pays([[(long[:250], (1,)), (long[:250], (2,))]] * 2), "all groups of the step count"
    assert not sharing_pays([[(long, tuple(range(9000))), (long, (2,))]]), "699 of 10,400 tokens are too small a share"
    assert not sharing_pays([[(long, (1,)), (long, (2,))], [((5,), (6,))]]), "a prompt of one token has no beginning"
    assert not sharing_pays([])


def test_sizes_by_hand():
    group = [((1, 2, 3, 4), (5, 6)), ((1, 2, 3, 9), (5,))]
    assert common_length([prompt for prompt, _ in group]) == 3
    whole, shared = group_size(group, False), group_size(group, True)
    assert whole == Size(prefixes=1, prefix=0, rows=2, row=6, real=11)
    assert shared == Size(prefixes=1, prefix=3, rows=2, row=3, real=8)
    assert (whole.num_tokens(False), whole.num_tokens(True)) == (12, 11)
    assert (shared.num_tokens(False), shared.num_tokens(True)) == (9, 8)
    assert (whole + whole).num_tokens(False) == 24
    assert (shared + Size(1, 10, 1, 1, 11)).num_tokens(False) == 2 * 10 + 3 * 3 + 3 * 10 // 8


def test_rows_by_their_longest():
    assert split_by_tokens([3, 9, 4, 5], 10) == [[1], [3, 2], [0]]
    assert split_by_tokens([30], 10) == [[0]]
    assert split_by_tokens([], 10) == []

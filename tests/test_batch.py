"""A step's rollouts in micro-batches: each in exactly one, within the bound, groups together where they share."""

import random

import pytest
from examples import CPU, make_example, make_rollout, random_ids

from pmd.batch import Batch, BatchLayout, Example, Size, common_length, group_size, sharing_pays, split_by_tokens

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
    examples = [*group_of(draw, 0, 8, 300), *group_of(draw, 1, 2, 10), *group_of(draw, 2, 6, 400)]
    draw.shuffle(examples)
    layout = BatchLayout(max_tokens, 0, 1.0, "token", frozenset(SHARED[share]), packs)
    seen, with_prefix = [], {"student": 0, "teacher": 0}
    for micro_batch in Batch(tuple(examples), 0, 0).micro_batches(layout, CPU):
        seen += [e.rollout.rollout_id for e in micro_batch.examples]
        for side in ("student", "teacher"):
            sequences = getattr(micro_batch, side)
            with_prefix[side] += len(micro_batch.examples) * (sequences.prefixes is not None)
            for row, example in enumerate(micro_batch.examples):
                prompt = example.rollout.prompt_ids if side == "student" else example.context.prompt_ids
                assert whole_row(sequences, row) == [*prompt, *example.completion_ids]
            assert sequences.completion_ids.tolist() == [t for e in micro_batch.examples for t in e.completion_ids]
            if len(micro_batch.examples) > 1:
                padded = sequences.input_ids.numel()
                if sequences.prefixes is not None:
                    padded += sequences.prefixes.input_ids.numel()
                assert (sequences.num_real_tokens if packs and sequences.prefixes is None else padded) <= max_tokens
    assert sorted(seen) == sorted(e.rollout.rollout_id for e in examples)
    if max_tokens == 100_000:  # smaller bounds split groups until there is nothing left to share
        assert with_prefix == {side: 16 if side in SHARED[share] else 0 for side in with_prefix}


def whole_row(sequences, row: int) -> list[int]:
    """The ids of one row as a model sees them, its prefix included."""
    real = sequences.attention_mask[row].bool()
    after = sequences.input_ids[row][real].tolist()
    if sequences.prefixes is None:
        return after
    prefix = sequences.prefixes.of_row[row]
    return sequences.prefixes.input_ids[prefix][sequences.prefixes.attention_mask[prefix].bool()].tolist() + after


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
    assert (whole.num_tokens(False), whole.num_tokens(True), shared.num_tokens(False)) == (12, 11, 9)
    assert (whole + whole).num_tokens(False) == 24
    assert (shared + Size(1, 10, 1, 1, 11)).num_tokens(False) == 2 * 10 + 3 * 3 + 3 * 10 // 8


def test_rows_by_their_longest():
    assert split_by_tokens([3, 9, 4, 5], 10) == [[1], [3, 2], [0]]
    assert split_by_tokens([30], 10) == [[0]]
    assert split_by_tokens([], 10) == []

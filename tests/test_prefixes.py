"""Shared prompts, passes and packing: the same hidden states and gradients as each row computed whole, by itself."""

import random
from functools import cache

import pytest
import torch
from examples import CPU, random_ids, small_qwen
from transformers import Qwen3ForCausalLM

from pmd import attention
from pmd.batch import (
    MIN_SAVED_PADDING,
    Pair,
    Sequences,
    common_length,
    pack_rows,
    pad_after_prefixes,
    pad_sequences,
    passes,
)  # fmt: skip
from pmd.packing import PackedSequences
from pmd.scoring import can_share_prefixes, completion_hidden_states, packs_rows, shares_packed_prefixes


def small_model(**changes: object) -> Qwen3ForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return small_qwen(40, **shape, num_key_value_heads=2, max_position_embeddings=1024, **changes).double()


def ids(draw: random.Random, length: int) -> tuple[int, ...]:
    return random_ids(draw, length, 40)


def rows_of_three_groups() -> tuple[list[Pair], list[int]]:
    """Prompts of 50, 7 and 400 shared ids; completions from 1 to 300 tokens, the longest first, groups mixed."""
    draw = random.Random(0)
    beginnings = [ids(draw, length) for length in (50, 7, 400)]
    rows = [(300, 2, 4), (290, 0, 0), (40, 1, 3), (30, 2, 0), (9, 0, 2), (8, 1, 0), (4, 0, 0), (1, 2, 1)]
    pairs = [(beginnings[group] + ids(draw, own), ids(draw, length)) for length, group, own in rows]
    return pairs, [group for _, group, _ in rows]


def one_by_one(model: Qwen3ForCausalLM, pairs: list[Pair]) -> torch.Tensor:
    return torch.cat([completion_hidden_states(model, pad_sequences([pair], 0, CPU)) for pair in pairs])


@cache
def expected_states_and_gradients(sliding: bool) -> list[torch.Tensor]:
    model, (pairs, _) = small_model(**(SLIDING if sliding else {})), rows_of_three_groups()
    return states_and_gradients(model, lambda: one_by_one(model, pairs))


def states_and_gradients(model: Qwen3ForCausalLM, way) -> list[torch.Tensor]:
    model.zero_grad()
    hidden = way()
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.model.parameters() if p.grad is not None)]


SLIDING = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
AFTER = (1 + 4 + 300) + (1 + 290) + (1 + 3 + 40) + (1 + 30) + (1 + 2 + 9) + (1 + 8) + (1 + 4) + (1 + 1 + 1)


def sequences_of(way: str, pairs: list[Pair], groups: list[int]) -> Sequences | PackedSequences:
    """Padded or packed rows, with their beginnings shared or not."""
    if way == "padded, shared":
        sequences = pad_after_prefixes(pairs, groups, 0, CPU)
        assert sequences.prefixes.attention_mask.sum(1).tolist() == [49, 6, 399]  # one token stays
        assert sequences.num_real_tokens == 49 + 6 + 399 + AFTER
        return sequences
    if way == "padded":
        return pad_sequences(pairs, 0, CPU)
    sequences = pack_rows(pairs, groups, shares=way == "packed, shared")
    if way == "packed, shared":  # a beginning of 6 tokens is too short to be shared by its two rows
        assert sequences.num_real_tokens == 49 + 2 * 6 + 399 + AFTER
        assert sequences.layout.own.lengths[:4] == (6 + 1 + 3 + 40, 6 + 1 + 8, 49, 399)
    return sequences


@pytest.mark.parametrize("way", ["padded", "padded, shared", "packed", "packed, shared", "packed, quadratic mask"])
@pytest.mark.parametrize("sliding", [False, True])
def test_every_way_equals_rows_computed_one_by_one_with_gradient(way, sliding):
    model, (pairs, groups) = small_model(**(SLIDING if sliding else {})), rows_of_three_groups()
    expected = expected_states_and_gradients(sliding)
    if way == "padded, shared" and sliding:
        assert not can_share_prefixes(model)
        return
    if way in ("packed", "packed, shared"):
        model.set_attn_implementation(attention.NAME)
    sequences = sequences_of(way, pairs, groups)
    computed = states_and_gradients(model, lambda: completion_hidden_states(model, sequences))
    assert len(computed) == len(expected) > 10
    for one, other in zip(computed, expected, strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()  # the model's norms are float32


def test_padded_rows_and_a_cache_work_with_the_attention_of_packed_rows():
    """What is scored outside of training is padded, and the hf engine generates with a cache."""
    model, (pairs, groups) = small_model(), rows_of_three_groups()
    expected = one_by_one(model, pairs)
    model.set_attn_implementation(attention.NAME)
    for way in ("padded", "padded, shared"):
        torch.testing.assert_close(completion_hidden_states(model, sequences_of(way, pairs, groups)), expected)


def test_a_rollout_of_a_group_of_one_has_a_prefix_of_its_own():
    model, draw = small_model(), random.Random(1)
    shared, alone = ids(draw, 9), ids(draw, 6)
    pairs = [(shared, ids(draw, 5)), (shared, ids(draw, 3)), (alone, ids(draw, 2))]
    sequences = pad_after_prefixes(pairs, [0, 0, 1], 0, CPU)
    assert sequences.prefixes.attention_mask.sum(1).tolist() == [8, 5]
    computed = completion_hidden_states(model, sequences)
    torch.testing.assert_close(computed, one_by_one(model, pairs))


def test_packing_needs_an_attention_that_gains_from_it():
    model, found = small_model(), {}
    for name in ("sdpa", "eager", "flash_attention_2", attention.NAME):
        model.config._attn_implementation = name
        found[name] = packs_rows(model), shares_packed_prefixes(model)
    no, packs = (False, False), (True, False)
    assert found == {"sdpa": no, "eager": no, "flash_attention_2": packs, attention.NAME: (True, True)}


def test_a_prefix_leaves_a_token_before_what_is_scored():
    long = tuple(range(700))
    assert common_length([long, long, long]) == 699
    assert common_length([long, (*long[:600], -1), long]) == 600
    assert common_length([long, long[:250]]) == 249
    assert common_length([(1, 2), (2, 2)]) == 0
    assert common_length([long]) == 699


def test_passes_hold_all_rows_once_and_save_enough():
    assert passes([10, 9, 8]) == [(slice(0, 3), slice(10))]
    assert passes([300, 20, 20, 10]) == [(slice(0, 1), slice(300)), (slice(1, 4), slice(20))]
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.randrange(1, 2000) for _ in range(draw.randrange(1, 40))]
        if draw.random() < 0.8:
            lengths.sort(reverse=True)
        found = passes(lengths)
        assert [row for rows, _ in found for row in range(rows.start, rows.stop)] == list(range(len(lengths)))
        assert all(columns.stop == max(lengths[rows]) for rows, columns in found)
        padded = sum((rows.stop - rows.start) * columns.stop for rows, columns in found)
        assert padded + (len(found) - 1) * MIN_SAVED_PADDING <= len(lengths) * max(lengths)


def test_checkpointing_in_training_forbids_a_cache():
    model = small_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert can_share_prefixes(model)
    assert not can_share_prefixes(model.train())


def test_rows_padded_on_the_left_are_one_pass():
    assert Sequences(*(torch.ones(2, 3) for _ in range(3))).passes == ((slice(None), slice(None)),)

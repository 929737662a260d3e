"""Shared prompts, passes and packing: the same hidden states and gradients as each row computed whole, by itself."""

import random

import pytest
import torch
from examples import CPU, random_ids, small_qwen
from transformers import Qwen3ForCausalLM

from pmd.batch import (
    MIN_SAVED_PADDING,
    Pair,
    Sequences,
    common_length,
    pad_after_prefixes,
    pad_sequences,
    passes,
)  # fmt: skip
from pmd.scoring import backbone, can_share_prefixes, completion_hidden_states, packed_states, packs_rows


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


def states_and_gradients(model: Qwen3ForCausalLM, way) -> list[torch.Tensor]:
    model.zero_grad()
    hidden = way()
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("way", ["prefixes", "passes", "packed"])
@pytest.mark.parametrize("sliding", [False, True])
def test_every_way_equals_rows_computed_one_by_one_with_gradient(way, sliding):
    model = small_model(use_sliding_window=True, sliding_window=16, max_window_layers=1) if sliding else small_model()
    pairs, groups = rows_of_three_groups()
    if way == "prefixes":
        if sliding:
            assert not can_share_prefixes(model)
            return
        sequences = pad_after_prefixes(pairs, groups, 0, CPU)
        assert sequences.prefixes.attention_mask.sum(1).tolist() == [49, 6, 399]  # one token stays
        after = (1 + 4 + 300) + (1 + 290) + (1 + 3 + 40) + (1 + 30) + (1 + 2 + 9) + (1 + 8) + (1 + 4) + (1 + 1 + 1)
        assert sequences.num_real_tokens == 49 + 6 + 399 + after
    else:
        sequences = pad_sequences(pairs, 0, CPU)
    assert len(sequences.passes) > 1
    ways = {"packed": lambda: packed_states(backbone(model), sequences)}
    computed = states_and_gradients(model, ways.get(way, lambda: completion_hidden_states(model, sequences)))
    expected = states_and_gradients(model, lambda: one_by_one(model, pairs))
    assert len(computed) == len(expected) > 10
    for one, other in zip(computed, expected, strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()  # the model's norms are float32


def test_a_rollout_of_a_group_of_one_has_a_prefix_of_its_own():
    model, draw = small_model(), random.Random(1)
    shared, alone = ids(draw, 9), ids(draw, 6)
    pairs = [(shared, ids(draw, 5)), (shared, ids(draw, 3)), (alone, ids(draw, 2))]
    sequences = pad_after_prefixes(pairs, [0, 0, 1], 0, CPU)
    assert sequences.prefixes.attention_mask.sum(1).tolist() == [8, 5]
    computed = completion_hidden_states(model, sequences)
    torch.testing.assert_close(computed, one_by_one(model, pairs))


def test_packing_needs_an_attention_that_gains_from_it():
    model = small_model()
    assert not packs_rows(model)
    model.config._attn_implementation = "flash_attention_2"
    assert packs_rows(model)


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

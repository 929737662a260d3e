"""GRPO against hand-worked numbers and against a plain loop over tokens."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmd.losses.policy_gradient import group_advantages, per_token_policy_loss

RULE = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}


def loss_of(ratio: float, advantage: float, **rule) -> float:
    old = torch.tensor([-1.0], dtype=torch.float64)
    student = old + math.log(ratio)
    return per_token_policy_loss(student, old, torch.tensor([advantage], dtype=torch.float64), **RULE | rule).item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 0.5, -0.5),
        (1.1, 0.5, -0.55),
        (1.5, 0.5, -0.64),  # clipped at 1.28
        (0.5, 0.5, -0.25),  # a good token grown unlikely is not clipped
        (0.5, -0.5, 0.4),  # clipped at 0.8
        (1.5, -0.5, 0.75),  # a bad token grown likely is not clipped
        (9.0, -0.5, 1.5),  # but bounded by 3 |A|
        (7.0, 0.0, 0.0),
    ],
)
def test_by_hand(ratio, advantage, expected):
    assert loss_of(ratio, advantage) == pytest.approx(expected, abs=1e-12)


def test_without_the_dual_clip_nothing_bounds_a_bad_token():
    assert loss_of(9.0, -0.5, dual_clip=None) == pytest.approx(4.5, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"), [(1.5, 0.5, False), (0.5, -0.5, False), (1.1, 0.5, True), (9.0, -0.5, False)]
)
def test_a_clipped_token_has_no_gradient(ratio, advantage, moves):
    old = torch.tensor([-1.0], dtype=torch.float64)
    student = (old + math.log(ratio)).requires_grad_()
    per_token_policy_loss(student, old, torch.tensor([advantage], dtype=torch.float64), **RULE).sum().backward()
    assert (student.grad.item() != 0.0) == moves


def plain_loss(student: float, old: float, advantage: float) -> float:
    """The rule as it is written on paper, one token at a time."""
    ratio = math.exp(student - old)
    clipped = min(max(ratio, 0.8), 1.28)
    loss = max(-ratio * advantage, -clipped * advantage)
    return min(loss, -3.0 * advantage) if advantage < 0 else loss


finite = st.floats(-5, 0, allow_nan=False)


@given(st.lists(st.tuples(finite, finite, st.floats(-2, 2, allow_nan=False)), min_size=1, max_size=20))
def test_equals_a_plain_loop(tokens):
    student, old, advantages = (torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True))
    expected = [plain_loss(*token) for token in tokens]
    assert per_token_policy_loss(student, old, advantages, **RULE).tolist() == pytest.approx(expected, abs=1e-10)


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    groups = torch.tensor([5, 5, 5, 5, 2, 2])
    assert group_advantages(rewards, groups).tolist() == [0.75, -0.25, -0.25, -0.25, 0.0, 0.0]


def test_advantages_divided_by_the_sample_deviation():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    found = group_advantages(rewards, torch.zeros(4, dtype=torch.long), normalize_std=True)
    deviation = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    assert found.tolist() == pytest.approx([0.75 / deviation, *[-0.25 / deviation] * 3], rel=1e-5)


def test_a_rollout_without_a_verdict_counts_nowhere():
    rewards = torch.tensor([1.0, float("nan"), 0.0], dtype=torch.float64)
    valid = torch.tensor([True, False, True])
    assert group_advantages(rewards, torch.zeros(3, dtype=torch.long), valid=valid).tolist() == [0.5, 0.0, -0.5]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_advantages_do_not_depend_on_order(rewards, random):
    groups = [random.randrange(3) for _ in rewards]
    order = list(range(len(rewards)))
    random.shuffle(order)
    straight = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups))
    shuffled = group_advantages(
        torch.tensor([rewards[i] for i in order], dtype=torch.float64), torch.tensor([groups[i] for i in order])
    )
    torch.testing.assert_close(shuffled, straight[torch.tensor(order)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reward", [0.92, 0.7, 0.99, 123.456, 1 / 3, -0.1, 1e-8, 1e6 + 0.3, 0.0])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 64, 1000])
@pytest.mark.parametrize("normalize_std", [False, True])
def test_equal_rewards_have_no_advantage_at_all(reward, size, normalize_std):
    rewards = torch.tensor([reward] * size + [0.0, 1.0, float("nan")])  # the last group differs, and one is not scored
    groups = torch.tensor([0] * size + [1, 1, 1])
    valid = ~rewards.isnan()
    found = group_advantages(rewards, groups, normalize_std=normalize_std, valid=valid)
    assert found[:size].abs().max() == 0.0
    assert found[-3] < 0 < found[-2]


def test_rewards_that_differ_by_rounding_are_equal_and_small_differences_are_not():
    group = torch.zeros(4, dtype=torch.long)
    sums = torch.tensor([0.1 + 0.2, 0.3, 0.3, 0.3], dtype=torch.float64)
    assert sums.unique().numel() == 2
    assert group_advantages(sums, group, normalize_std=True).abs().max() == 0.0
    close = torch.tensor([0.92, 0.92001, 0.92, 0.92])
    assert group_advantages(close, group, normalize_std=True)[1] > 0.5
    tiny = torch.tensor([1e-8, 2e-8, 1e-8, 1e-8])
    assert group_advantages(tiny, group)[1] > 0


def test_a_group_without_any_scored_rollout_has_no_advantage():
    rewards = torch.tensor([float("nan"), 0.5])
    found = group_advantages(rewards, torch.zeros(2, dtype=torch.long), valid=torch.zeros(2, dtype=torch.bool))
    assert found.tolist() == [0.0, 0.0]

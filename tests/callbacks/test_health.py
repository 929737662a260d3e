"""A run ends if every step must be skipped, and tells of a policy that collapses or leaves its range."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from examples import fit_batches, take_steps, tiny_module, trained, varied_examples

from pmd.batch import Batch
from pmd.callbacks.health import MAX_SKIPPED, WINDOW, HealthCallback, Ranges
from pmd.callbacks.trace import TraceCallback
from pmd.config.schema import ObjectiveConfig
from pmd.errors import TrainingError
from pmd.trace import trace_path

RUN = Path("runs/one")


def warnings_of(
    rewards: Sequence[float], *, lengths: Sequence[float] = (), entropies: Sequence[float] = (), num_rollouts: int = 2
) -> list[tuple[int, str]]:
    """Return (step, sentence) for every warning in a run with these metrics."""
    ranges = Ranges()
    lengths, entropies = lengths or [5.0] * len(rewards), entropies or [1.0] * len(rewards)
    found = []
    for step, (reward, length, entropy) in enumerate(zip(rewards, lengths, entropies, strict=True)):
        metrics = {"rollout/reward": reward, "rollout/mean_length": length, "student/entropy": entropy}
        found += [(step, sentence) for sentence in ranges.add(metrics, num_rollouts).values()]
    return found


def test_a_run_whose_every_step_is_skipped_ends_with_its_batches_kept(tmp_path):
    module = tiny_module(ObjectiveConfig(alpha="symmetric"))
    list(trained(module).values())[-1].register_hook(lambda gradient: torch.full_like(gradient, math.nan))
    callbacks = TraceCallback(tmp_path, every=0), HealthCallback(RUN, stop_on_collapse=False)
    with pytest.raises(TrainingError, match=rf"{MAX_SKIPPED} steps in a row.*inspect step runs/one --step 4\."):
        take_steps(module, [varied_examples(2)] * (MAX_SKIPPED + 3), *callbacks)
    assert [trace_path(tmp_path, step).is_file() for step in range(MAX_SKIPPED + 1)] == [True] * MAX_SKIPPED + [False]


def test_skipped_steps_that_are_not_in_a_row_do_not_end_a_run():
    module, calls = tiny_module(ObjectiveConfig(alpha="symmetric")), iter(range(1000))
    spoil = lambda gradient: torch.full_like(gradient, math.nan) if next(calls) % 2 else gradient  # noqa: E731
    list(trained(module).values())[-1].register_hook(spoil)
    take_steps(module, [varied_examples(2)] * (2 * MAX_SKIPPED + 2), HealthCallback(RUN, stop_on_collapse=True))
    assert module.policy_version == MAX_SKIPPED + 1


def test_a_collapse_is_told_once():
    [(step, sentence)] = warnings_of([0.5] * WINDOW + [0.0] * 2 * WINDOW)
    assert step == 17
    assert "the policy has collapsed: its mean reward over 10 steps is 0.100, and was 0.500." in sentence


def test_chance_is_not_a_collapse():
    """Where rewards are rare, ten steps may pass without one."""
    assert warnings_of([0.02] * WINDOW + [0.0] * WINDOW) == []
    assert len(warnings_of([0.02] * WINDOW + [0.0] * WINDOW, num_rollouts=64)) == 1


@pytest.mark.parametrize(("then", "expected"), [(0.2, 1), (0.9, 0)])
def test_vanishing_entropy_is_told_unless_the_policy_is_right(then, expected):
    found = warnings_of([0.1] * WINDOW + [then] * WINDOW, entropies=[1.0] * WINDOW + [0.001] * WINDOW)
    sentence = "student/entropy is 0.001 over 10 steps, and was 1 in the first ones."
    assert found == [(2 * WINDOW - 1, sentence)] * expected


def test_growing_completions_are_told_again_after_they_were_in_range():
    lengths = [5.0] * WINDOW + [50.0] * WINDOW + [5.0] * WINDOW + [50.0] * WINDOW
    found = warnings_of([0.5] * len(lengths), lengths=lengths)
    assert [step // WINDOW for step, _ in found] == [1, 3]
    assert all("rollout/mean_length is" in sentence for _, sentence in found)


@pytest.mark.parametrize("stop", [True, False])
def test_a_collapse_is_printed_or_ends_the_run(stop, caplog):
    module = tiny_module(ObjectiveConfig(alpha="symmetric", update_policy=False))
    metrics = [{"rollout/reward": reward, "rollout/mean_length": 5.0} for reward in [0.5] * WINDOW + [0.0] * WINDOW]
    batches = [Batch(tuple(varied_examples(2)), 0, step, values) for step, values in enumerate(metrics)]
    callback = HealthCallback(RUN, stop_on_collapse=stop)
    if stop:
        with pytest.raises(TrainingError, match="stop_on_collapse=true ended the run at step 17: the policy has coll"):
            fit_batches(module, batches, callback)
    else:
        fit_batches(module, batches, callback)
        assert "step 17: the policy has collapsed" in caplog.text

"""What training cost, and scores at equal tokens."""

import pytest
import torch

from pmd.evaluation.costs import cost_of, count, scores_at
from pmd.metrics_log import MetricsLog
from pmd.run_dir import RunDir


def train(run_dir: RunDir, epochs: range, resumed_at: int | None = None, reflects: int = 0) -> None:
    """Log epochs of two steps of 100 tokens; each ends with a score and, if there are any, tokens of reflections and
    behaviours."""
    log = MetricsLog(run_dir, resumed_at)
    if resumed_at is None:
        log.log_metrics({"verify/avg": 0.0}, step=0)
    for epoch in epochs:
        for step in (2 * epoch, 2 * epoch + 1):
            log.log_metrics({"rollout/num_tokens": torch.tensor(100.0)}, step=step)
        written = {"reflect/num_tokens": reflects - 20.0, "reflect/num_behaviour_tokens": 20.0} if reflects else {}
        log.log_metrics({"verify/avg": (epoch + 1) / 10} | written, step=2 * epoch + 1)
    log.save()


def so_far(run_dir: RunDir) -> list[str]:
    return [row.get("cost/generated_tokens", "") for row in run_dir.read_metrics()]


def test_rows_carry_the_tokens_so_far_and_a_resumed_run_goes_on_counting(tmp_path):
    whole, resumed = RunDir(tmp_path / "whole"), RunDir(tmp_path / "resumed")
    for run_dir in (whole, resumed):
        run_dir.root.mkdir()
    train(whole, range(2), reflects=50)
    assert so_far(whole) == ["", "100.0", "200.0", "250.0", "350.0", "450.0", "500.0"]
    train(resumed, range(2), reflects=50)
    train(resumed, range(1, 2), resumed_at=2, reflects=50)
    assert so_far(resumed) == so_far(whole)
    assert sum(float(row["time/cpu_s"] or 0) for row in whole.read_metrics()) > 0


@pytest.mark.parametrize(
    ("tokens", "score"),
    [(0, {"avg": 0.0, "tokens": 0.0}), (50, {"avg": 0.02, "tokens": 50.0}), (250, {"avg": 0.1, "tokens": 250.0}),
     (375, {"avg": 0.15, "tokens": 375.0}), (10**6, {"avg": 0.3, "tokens": 750.0})],
)  # fmt: skip
def test_scores_are_interpolated_between_evaluations_and_end_with_the_last(tmp_path, tokens, score):
    """Evaluated at 0, 250, 500 and 750 tokens: 0, .1, .2 and .3."""
    train(RunDir(tmp_path), range(3), reflects=50)
    assert scores_at(RunDir(tmp_path).read_metrics(), tokens) == pytest.approx(score)


def test_a_run_that_was_not_evaluated_has_no_score_at_any_number_of_tokens():
    assert scores_at([{"step": "4", "cost/generated_tokens": "500"}], 100) == {}


def test_an_evaluation_within_an_epoch_counts_the_step_that_it_follows(tmp_path):
    """Its row is written before that of the step."""
    rows = [
        {"step": "0", "verify/avg": "0.1"},
        {"step": "4", "cost/generated_tokens": "500"},
        {"step": "5", "verify/avg": "0.5", "verify/memory_conditioned_avg": "0.75"},
        {"step": "5", "cost/generated_tokens": "600"},
    ]
    assert scores_at(rows, 300) == pytest.approx({"avg": 0.3, "tokens": 300.0})  # memory was not scored before training
    assert scores_at(rows, 600) == {"avg": 0.5, "with memory": 0.75, "tokens": 600.0}


def test_a_cost_leaves_evaluations_out():
    totals = {
        "rollout/num_tokens": 1e6, "reflect/num_tokens": 4e5, "reflect/num_behaviour_tokens": 1e5, "time/cpu_s": 60.0,
        "time/verification_cpu_s": 10.0, "time/verification_s": 20.0, "time/student_s": 30.0, "time/rollout_s": 40.0,
    }  # fmt: skip
    on_cpu = cost_of({"totals": totals, "device": "cpu"})
    assert on_cpu
    assert (on_cpu.tokens, on_cpu.reflection_tokens, on_cpu.seconds, on_cpu.device) == (1.5e6, 5e5, 50.0, "CPU")
    assert str(on_cpu) == "1.5 M tokens generated in training, 500 k of them reflections; 50 CPU seconds"
    on_gpu = cost_of({"totals": totals, "device": "cuda"})
    assert on_gpu
    assert (on_gpu.seconds, on_gpu.device) == (70.0, "GPU")
    prefetched = cost_of({"totals": totals | {"time/overlap_s": 25.0}, "device": "cuda"})
    assert prefetched
    assert prefetched.seconds == 45.0  # 25 of the 40 seconds of rollouts passed while the policy trained
    assert cost_of({"phases": {}}) is None
    assert [count(number) for number in (12, 4_530, 7e6, 2.5e9)] == ["12", "4.53 k", "7 M", "2.5 G"]

"""The table of a sweep: costs, equal tokens, domains without training tasks, checkpoints chosen on test."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pmd.planning.sweep.grid import PlannedRun
from pmd.planning.sweep.paired import difference_rows, write_differences
from pmd.planning.sweep.table import make_rows, print_rows, write_rows

PHASE = {"avg": 0.5, "pass_at": {"1": 0.5, "8": 0.75}, "memory_conditioned": None, "domain_mean": {"avg": 0.25}}


def finished(folder: Path, arm: str, seed: int, tokens_per_epoch: float, **facts) -> PlannedRun:
    """Return a run of four epochs whose validation score is the number of the epoch in tenths."""
    run_dir = folder / arm / str(seed)
    run_dir.mkdir(parents=True)
    rows = ["step,verify/avg,cost/generated_tokens", "0,0.0,"]
    rows += [f"{epoch},{epoch / 10},{tokens_per_epoch * epoch}" for epoch in (1, 2, 3, 4)]
    (run_dir / "metrics.csv").write_text("\n".join(rows) + "\n")
    totals = {"rollout/num_tokens": 4 * tokens_per_epoch, "time/cpu_s": 90.0, "time/verification_cpu_s": 30.0}
    results = {"rollouts": 64, "updates": 4, "device": "cpu", "totals": totals, "phases": {"last": PHASE}} | facts
    (run_dir / "results.json").write_text(json.dumps(results))
    return PlannedRun("", arm, (), seed, (), run_dir, "{}")


def test_arms_are_compared_at_the_tokens_of_the_cheapest_seed_by_seed(tmp_path):
    """Seed 0: 400 tokens for SDPO, and PMD has them after two of its epochs; seed 1: PMD is the cheaper one."""
    runs = [finished(tmp_path, "SDPO", seed, each) for seed, each in ((0, 100.0), (1, 300.0))]
    runs += [finished(tmp_path, "PMD", seed, each) for seed, each in ((0, 200.0), (1, 200.0))]
    rows = make_rows(runs)
    assert [row.label for row in rows] == ["base", "SDPO", "PMD", "SDPO", "PMD"]
    sdpo, pmd, sdpo_equal, pmd_equal = rows[1:]
    assert (sdpo.tokens, pmd.tokens, sdpo.seconds, sdpo.device) == (800.0, 800.0, 60.0, "CPU")
    assert sdpo_equal.block == pmd_equal.block
    assert "equal tokens (600), validation tasks" in sdpo_equal.block
    assert sdpo_equal.quantities["avg"].mean == pytest.approx((0.4 + 0.8 / 3) / 2)
    assert pmd_equal.quantities["avg"].mean == pytest.approx((0.2 + 0.4) / 2)
    assert (sdpo_equal.tokens, pmd_equal.tokens) == (600, 600)
    write_rows(rows, tmp_path, "title")
    table = (tmp_path / "table.md").read_text()
    assert "| method | avg | pass@8 | tokens | seconds | seeds |" in table
    assert "each seed at what its cheapest arm generated, interpolated between evaluations" in table
    assert "| PMD | 50.0 ± 0.0 | 75.0 ± 0.0 | 800 | 60 CPU | 2 |" in table


def test_differences_at_equal_tokens_are_paired_by_seed(tmp_path):
    """At 400, 800 and 400 tokens SDPO has .4, .8 / 3 (interpolated) and .4, PMD .2, .4 and .1."""
    runs = [finished(tmp_path, "SDPO", seed, each) for seed, each in enumerate((100.0, 300.0, 100.0))]
    runs += [finished(tmp_path, "PMD", seed, each) for seed, each in enumerate((200.0, 200.0, 400.0))]
    rows = difference_rows(make_rows(runs), "PMD")
    (found,) = [row.differences["avg"] for row in rows if "equal tokens" in row.block]
    # Differences .2, -.4 / 3, .3: mean .1222, squared deviations .00605, .06531, .03160; t(2, .975) = 4.3027.
    assert (found.mean, found.num_seeds) == (pytest.approx(0.11 / 0.9), 3)
    assert found.half_width == pytest.approx(4.3027 * math.sqrt(0.102963 / 2 / 3), rel=1e-4)
    write_differences(rows, "PMD", tmp_path)
    written = (tmp_path / "differences.md").read_text()
    assert "| *at equal tokens (533), validation tasks* |" in written
    assert "| SDPO | +12.2 ± 56.4 | - |" in written


def test_a_score_with_memory_in_the_prompt_stands_in_its_own_column(tmp_path):
    """Transfer: the untrained policy, tested without memory and with that of another run."""
    runs = []
    for arm, facts in (("no memory", {}), ("k=3", {"memory": {"store": "runs/a", "k": 3}})):
        run = finished(tmp_path, arm, 0, 100.0, phases={"initial": PHASE}, totals={}, **facts)
        runs.append(replace(run, command="test"))
    rows = make_rows(runs)
    assert [(row.label, sorted(row.quantities)) for row in rows] == [
        ("no memory", ["avg", "pass@8"]), ("k=3", ["with memory"]),
    ]  # fmt: skip
    write_rows(rows, tmp_path, "title")
    assert "| k=3 | - | - | 50.0 | - | - | 1 |" in (tmp_path / "table.md").read_text()


def test_other_domains_and_a_choice_on_test_tasks_have_columns(tmp_path, capsys):
    phases = {"last": PHASE, "best": PHASE | {"avg": 0.625}, "last_other_domains": PHASE}
    run = finished(tmp_path, "SDPO", 0, 100.0, phases=phases, selected_on="test")
    rows = make_rows([run])
    assert len(rows) == 2  # one trained arm is compared with nothing
    assert {name: estimate.mean for name, estimate in rows[1].quantities.items()} == {
        "avg": 0.5, "pass@8": 0.75, "other domains": 0.25, "best (chosen on test)": 0.625,
    }  # fmt: skip
    print_rows(rows, "title", Console(width=160))
    assert "best (chosen on test)" in capsys.readouterr().out

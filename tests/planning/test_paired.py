"""Differences paired by seed, against numbers worked by hand."""

import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from pmd.errors import ConfigError
from pmd.planning.sweep.grid import PlannedRun, plan
from pmd.planning.sweep.paired import difference_rows, paired_difference, print_differences, write_differences
from pmd.planning.sweep.table import make_rows


def test_the_interval_of_three_seeds():
    # Differences .1, .2, .3: mean .2, standard deviation .1, standard error .1 / sqrt(3), t(2, .975) = 4.3027.
    found = paired_difference({0: 0.5, 1: 0.9, 2: 0.7}, {2: 0.4, 0: 0.4, 1: 0.7, 9: 0.0})
    assert found is not None
    assert (found.mean, found.num_seeds) == (pytest.approx(0.2), 3)
    assert found.half_width == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert str(found) == "+20.0 ± 24.8"


def test_a_common_shift_of_the_seeds_costs_no_precision():
    found = paired_difference({0: 0.9, 1: 0.3}, {0: 0.8, 1: 0.2})
    assert found is not None
    assert found.half_width == pytest.approx(0.0, abs=1e-9)


def test_too_few_seeds_give_no_interval():
    assert str(paired_difference({0: 0.5}, {0: 0.7})) == "-20.0"
    assert paired_difference({0: 0.5}, {1: 0.7}) is None


def finished(folder: Path, arm: str, seed: int, avg: float, with_memory: float | None) -> PlannedRun:
    """Return a run whose results hold these scores."""
    run_dir = folder / arm / f"seed-{seed}"
    run_dir.mkdir(parents=True)
    last = {"avg": avg, "pass_at": {"1": avg, "8": avg + 0.1}, "memory_conditioned": with_memory}
    results = {"rollouts": 64, "updates": 4, "phases": {"last": last}}
    (run_dir / "results.json").write_text(json.dumps(results))
    return PlannedRun("block", arm, (), seed, (), run_dir, "")


def test_arms_are_compared_with_the_reference_of_their_block(tmp_path):
    runs = [
        *(finished(tmp_path, "PMD", seed, avg, 0.95) for seed, avg in ((0, 0.8), (1, 0.9))),
        *(finished(tmp_path, "frozen policy", seed, 0.1, avg) for seed, avg in ((0, 0.4), (1, 0.5))),
        *(finished(tmp_path, "GRPO", seed, avg, None) for seed, avg in ((0, 0.5), (1, 0.6))),
    ]
    rows = {row.label: row.differences for row in difference_rows(make_rows(runs), "PMD")}
    assert list(rows["PMD"]) == ["with memory"]
    assert rows["PMD"]["with memory"].mean == pytest.approx(0.1)
    assert rows["frozen policy"]["avg"].mean == pytest.approx(-0.75)
    assert rows["frozen policy"]["with memory"].mean == pytest.approx(-0.4)  # from PMD without memory
    assert rows["frozen policy"]["with memory"].half_width == pytest.approx(0.0, abs=1e-9)
    assert rows["GRPO"]["pass@8"].mean == pytest.approx(-0.3)
    assert "with memory" not in rows["GRPO"]
    printed = Console(file=StringIO(), width=120)
    print_differences(difference_rows(make_rows(runs), "PMD"), "PMD", printed)
    assert "GRPO -30.0 ± 0.0 -30.0 ± 0.0 -" in " ".join(printed.file.getvalue().split())
    write_differences(difference_rows(make_rows(runs), "PMD"), "PMD", tmp_path)
    assert "| GRPO | -30.0 ± 0.0 | -30.0 ± 0.0 | - |" in (tmp_path / "differences.md").read_text()


def test_a_reference_that_was_only_scored_with_memory_is_compared_with_that(tmp_path):
    runs = []
    for arm, scores in (("k=3", (0.5, 0.25)), ("k=1", (0.25, 0.125))):
        for seed, avg in enumerate(scores):
            run = finished(tmp_path, arm, seed, avg, None)
            result = {"phases": {"initial": json.loads(run.results.read_text())["phases"]["last"]}, "memory": {"k": 3}}
            run.results.write_text(json.dumps(result))
            runs.append(replace(run, command="test"))
    (row,) = difference_rows(make_rows(runs), "k=3")
    assert (row.label, list(row.differences)) == ("k=1", ["with memory"])
    assert row.differences["with memory"].mean == pytest.approx((-0.25 - 0.125) / 2)


def test_a_reference_must_be_an_arm_of_every_block(tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text("base: configs/tiny.yaml\nreference: PMD\nblocks: [{arms: {pmd: {}}}]\n")
    with pytest.raises(ConfigError, match="no arm 'PMD' without axes, the grid's reference"):
        plan(grid, tmp_path)

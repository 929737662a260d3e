"""A sweep's report page: the table, and the curves over seeds of the arms that were trained."""

import json
from dataclasses import replace

import pytest

from pmd.planning.sweep import page
from pmd.planning.sweep.grid import PlannedRun
from pmd.planning.sweep.page import write_page
from pmd.planning.sweep.table import make_rows, write_rows

PHASE = {"avg": 0.5, "pass_at": {"1": 0.5, "2": 0.75}, "memory_conditioned": None, "domain_mean": {"avg": 0.25}}


@pytest.fixture
def runs(tmp_path) -> list[PlannedRun]:
    """Two arms of two seeds each; seed 1 of the first has one evaluation more, and samples that are all right."""
    made = []
    for arm in ("GRPO", "PMD <new>"):
        for seed in (0, 1):
            run_dir = tmp_path / f"{arm[:3]}-{seed}"
            run_dir.mkdir()
            steps = range(3 if (arm, seed) == ("GRPO", 1) else 2)
            lines = ["step,verify/avg", *(f"{step},{(step + seed) / 10}" for step in steps)]
            (run_dir / "metrics.csv").write_text("\n".join(lines) + "\n")
            samples = [
                {"phase": "last", "task_id": task, "domain": "", "correct": bool(seed or number == 0), "reward": 1.0}
                | {"answer": None, "status": "ok"}
                for task in ("a", "b")
                for number in range(2)
            ]
            (run_dir / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
            results = {"rollouts": 4, "updates": 2, "device": "cpu", "totals": {}, "phases": {"last": PHASE}}
            (run_dir / "results.json").write_text(json.dumps(results))
            made.append(PlannedRun("", arm, (), seed, (), run_dir, "{}"))
    return made


def test_the_page_shows_the_table_and_three_pictures(runs, tmp_path):
    rows = make_rows(runs)
    write_rows(rows, tmp_path, "title")
    write_page(runs, rows, tmp_path, "title")
    text = (tmp_path / "report.html").read_text()
    assert "<td>PMD &lt;new&gt;</td><td>50.0 ± 0.0</td><td>75.0 ± 0.0</td>" in text
    for name in ("sweep.png", "curves.png", "pass_at_k.png"):
        assert f'src="{name}"' in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_curves_are_means_over_seeds_where_all_seeds_have_values(runs):
    steps, means, errors = page._learning_curve(runs[:2])
    assert (steps, means, errors) == ([1, 2], pytest.approx([5, 15]), pytest.approx([5, 5]))
    ks, means, errors = page._pass_curve(runs[:2])
    assert (ks, means, errors) == ([1, 2], pytest.approx([75, 100]), pytest.approx([25, 0]))


def test_runs_that_only_test_have_no_curves(runs, tmp_path):
    tested = [replace(run, command="test") for run in runs]
    for run in tested:
        results = json.loads(run.results.read_text()) | {"phases": {"initial": PHASE}}
        run.results.write_text(json.dumps(results))
    rows = make_rows(tested)
    write_page(tested, rows, tmp_path, "title")
    assert "curves.png" not in (tmp_path / "report.html").read_text()

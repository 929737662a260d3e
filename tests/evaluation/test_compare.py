"""Comparing methods: numbers by hand, coverage of the interval, the command."""

import json

import numpy as np
import pytest

from pmd.cli import main
from pmd.cli.compare import read_run
from pmd.evaluation.compare import (
    MethodRun,
    Question,
    bootstrap,
    compare,
    mean_correct,
    pass_value,
    question_values,
    solved_sets,
)
from pmd.evaluation.metrics import Sample


def run(method, seed, values, domains=None):
    domains = domains or ["d"] * len(values)
    return MethodRun(
        method, seed, {f"q{i}": Question(d, float(v)) for i, (v, d) in enumerate(zip(values, domains, strict=True))}
    )


def test_by_hand():
    base, ours = run("base", 0, [0, 0, 1, 0], ["x", "x", "x", "y"]), run("pmd", 0, [1, 0, 1, 1], ["x", "x", "x", "y"])
    first, second = compare([base, ours], resamples=2000)
    assert first.pooled_difference is None
    assert (first.pooled, second.pooled) == (0.25, 0.75)
    assert second.by_domain == pytest.approx({"x": 2 / 3, "y": 1.0})
    assert second.domain_mean == pytest.approx(5 / 6)
    assert second.pooled_difference
    assert second.domain_mean_difference
    assert second.pooled_difference.difference == pytest.approx(0.5)
    assert second.domain_mean_difference.difference == pytest.approx((1 / 3 + 1) / 2)
    assert second.domain_differences
    assert second.domain_differences["y"].low == second.domain_differences["y"].high == 1.0


def test_what_one_method_solves_and_the_other_does_not():
    """Seed 0: both, only ours, only theirs (ours is mostly wrong), neither. Seed 1: only ours, all four."""
    base = [run("base", 0, [1.0, 0.0, 0.75, 0.0]), run("base", 1, [0.0] * 4)]
    ours = [run("pmd", 1, [1.0] * 4), run("pmd", 0, [1.0, 0.75, 0.25, 0.0])]
    any_sample, most = solved_sets([*base, *ours])
    assert (any_sample.both, any_sample.only_method, any_sample.only_baseline, any_sample.neither) == (
        2 / 8, 5 / 8, 0.0, 1 / 8,
    )  # fmt: skip
    assert (most.both, most.only_method, most.only_baseline, most.neither) == (1 / 8, 5 / 8, 1 / 8, 1 / 8)
    assert most.only_baseline_ids == ("q2",)
    assert most.only_method_ids == ("q0", "q1", "q2", "q3")


def test_runs_without_a_partner_of_their_seed_are_paired_with_every_other():
    runs = [run("base", 0, [1.0]), run("base", 1, [0.0]), run("pmd", 7, [1.0])]
    assert [(one.both, one.only_method) for one in solved_sets(runs)] == [(0.5, 0.5)] * 2
    assert solved_sets(runs[:2]) == []


def test_pairing_removes_what_questions_share():
    generator = np.random.default_rng(0)
    difficulty = generator.uniform(size=200)
    _, ours = compare([run("base", 0, difficulty), run("pmd", 0, difficulty + 0.01)], resamples=500)
    assert ours.pooled_difference
    assert ours.pooled_difference.low == pytest.approx(0.01)
    assert ours.pooled_difference.high == pytest.approx(0.01)


def test_seeds_are_the_outer_level():
    """Questions agree and seeds differ, so the interval must show the spread of the seeds."""
    base = [run("base", seed, [0.5] * 50) for seed in range(4)]
    ours = [run("pmd", seed, [0.5 + shift] * 50) for seed, shift in enumerate((-0.2, -0.1, 0.1, 0.2))]
    _, found = compare([*base, *ours], resamples=4000)
    assert found.pooled_difference
    assert found.pooled_difference.error == pytest.approx(np.std([-0.2, -0.1, 0.1, 0.2]) / 2, rel=0.1)


def test_the_same_seed_gives_the_same_numbers_and_order_does_not_matter():
    runs = [run("base", 0, [0, 1, 0, 1, 1]), run("a", 0, [1, 1, 0, 1, 1]), run("b", 1, [1, 0, 0, 0, 1])]
    first, again, swapped = compare(runs, 7), compare(runs, 7), compare([runs[0], runs[2], runs[1]], 7)
    assert first == again
    assert {c.method: c for c in first} == {c.method: c for c in swapped}


def test_runs_with_questions_of_their_own_are_resampled_separately():
    """Each seed has its own questions, the same for every method."""
    generator = np.random.default_rng(0)
    runs = []
    for seed in range(4):
        values = generator.uniform(size=30)
        for method, shift in (("base", 0.0), ("pmd", 0.1)):
            questions = {f"s{seed}/q{i}": Question("d", v + shift) for i, v in enumerate(values)}
            runs.append(MethodRun(method, seed, questions))
    _, found = compare(runs, resamples=500)
    assert found.pooled_difference
    assert (found.num_runs, found.num_questions) == (4, 30)
    assert found.pooled_difference.difference == pytest.approx(0.1)
    assert found.pooled_difference.low == pytest.approx(0.1)
    with pytest.raises(ValueError, match="other questions"):
        compare(runs[:-1])


def test_runs_with_different_questions_are_refused():
    with pytest.raises(ValueError, match="other questions"):
        compare([run("base", 0, [0, 1]), run("pmd", 0, [0, 1, 1])])


@pytest.mark.parametrize("num_runs", [1, 5])
def test_the_interval_covers_the_truth(num_runs):
    """Over many simulated comparisons the 95 % interval contains the true difference about 95 % of the time.

    With five seeds a percentile bootstrap's interval is too narrow by sqrt(4/5), hence the lower bound.
    """
    generator = np.random.default_rng(1)
    covered, truth, trials = 0, 0.1, 400
    domains = np.array(["x"] * 60 + ["y"] * 40)
    for _ in range(trials):
        difficulty = generator.normal(0.5, 0.2, size=100)
        spread = 0.05 if num_runs > 1 else 0.0
        seeds = generator.normal(0, spread, size=(num_runs, 1))
        theirs = difficulty + generator.normal(0, 0.1, size=(num_runs, 100))
        ours = difficulty + truth + seeds + generator.normal(0, 0.1, size=(num_runs, 100))
        drawn = bootstrap(ours, theirs, domains, generator, 500) @ np.array([0.6, 0.4])
        low, high = np.percentile(drawn, [2.5, 97.5])
        covered += low <= truth <= high
    lowest = 0.92 if num_runs == 1 else 0.82
    assert lowest <= covered / trials <= 0.98


def test_values_of_questions():
    samples = [Sample("q", "d", correct, 0.0) for correct in (True, False, False, False)]
    assert question_values(samples, mean_correct)["q"].value == 0.25
    assert question_values(samples, pass_value(2))["q"].value == pytest.approx(0.5)


def write_run(folder, method, seed, rate, num_samples=4):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"method": method, "seed": seed}))
    generator = np.random.default_rng([seed, int(100 * rate)])
    rest = {"reward": 0.0, "answer": None}
    rows = [
        {"phase": phase, "task_id": f"q{q}", "domain": "xy"[q % 2], "sample": s, "correct": bool(c), **rest}
        for phase in ("initial", "last")
        for (q, s), c in np.ndenumerate(generator.random((40, num_samples)) < rate)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_the_command(tmp_path, capsys):
    runs = [write_run(tmp_path / f"{m}{s}", m, s, r) for m, r in (("grpo", 0.4), ("pmd", 0.8)) for s in range(3)]
    assert main(["compare", *runs, "--resamples=1000", f"--out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "95 %" in printed
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert content["methods"][1]["domain_mean_difference"]["low"] > 0.2
    assert content["methods"][1]["num_runs"] == 3
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000
    assert (tmp_path / "out" / "solved.png").stat().st_size > 5000
    assert len(content["solved"]) == 2
    assert main(["compare", *runs, "--metric=pass@4", "--phase=initial", "--resamples=200"]) == 0
    assert "--out" in capsys.readouterr().out


def test_unverified_samples_are_left_out(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, "a", 0, 1.0)
    with (folder / "samples.jsonl").open("a") as file:
        row = {"phase": "last", "task_id": "q0", "domain": "x", "sample": 4, "correct": False, "reward": 0.0}
        file.write(json.dumps(row | {"answer": None, "status": "sandbox_error"}) + "\n")
    _, samples, problems = read_run(folder, "last")
    assert not problems
    assert len(samples) == 160
    assert all(sample.correct for sample in samples)
    assert "it has initial, last" in read_run(folder, "best")[2][0]


def test_all_problems_are_named_at_once(tmp_path, capsys):
    good = write_run(tmp_path / "good", "a", 0, 0.5)
    damaged = write_run(tmp_path / "damaged", "b", 0, 0.5)
    (tmp_path / "damaged" / "samples.jsonl").write_text('{"phase": "last", "task_id": 3}\n{\n')
    assert main(["compare", good, damaged, str(tmp_path / "none"), "--metric=best", "--resamples=1"]) == 2
    error = capsys.readouterr().err
    named = ["samples.jsonl:1: task_id=3", "samples.jsonl:2: not valid JSON", "none: results.json"]
    for words in [*named, "--metric=best", "--resamples=1"]:
        assert words in error
    assert main(["compare", good]) == 2
    assert main(["compare", good, good, "--metric=pass@9"]) == 2
    assert main(["compare", good, good, "--phase=best"]) == 2

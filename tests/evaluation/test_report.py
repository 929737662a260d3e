"""The final table, its files and plots, and the scores of guessing."""

import itertools
import json
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from pmd.config.schema import RunConfig
from pmd.evaluation.evaluate import evaluation_facts
from pmd.evaluation.metrics import Sample, chance_scores, score_samples
from pmd.evaluation.report import Phase, chosen_ks, draw_pass_at, print_table, results_of, write_results
from pmd.run_dir import RunDir
from pmd.types import CaseCounts, Message, Task


def question(task_id, domain, letters, verifier="mcq"):
    options = "\n".join(f"{letter}: option" for letter in letters)
    return Task(task_id, (Message("user", f"Q?\n\n{options}"),), verifier, "test", answer="A", domain=domain)


TASKS = [question("1", "x", "ABCD"), question("2", "x", "AB"), question("3", "y", "ABCD")]


def test_chance_scores_against_enumeration():
    chance = chance_scores(TASKS, [1, 3])
    assert chance
    x, y = (chance["by_domain"][domain] for domain in "xy")
    for numbers, found in (((4, 2, 4), chance), ((4, 2), x), ((4,), y)):
        draws = [list(itertools.product(range(m), repeat=3)) for m in numbers]
        assert found["avg"] == pytest.approx(np.mean([1 / m for m in numbers]))
        assert found["pass_at"][1] == pytest.approx(found["avg"])
        assert found["pass_at"][3] == pytest.approx(np.mean([np.mean([0 in d for d in own]) for own in draws]))
        assert found["coverage_at"][3] == pytest.approx(np.mean([np.mean([len(set(d)) for d in own]) for own in draws]))


def test_results_name_how_answers_are_read():
    tests = ({}, {"scorer": "sdpo"}), ({}, {"reading": "strict"}), ({},)
    verifiers = ("code", "tool_use", "mcq")
    tasks = [
        Task(f"{verifier}{number}", TASKS[0].messages, verifier, "test", answer="A", tests=given)
        for verifier, each in zip(verifiers, tests, strict=True)
        for number, given in enumerate(each)
    ]
    assert evaluation_facts(RunConfig(), tasks)["scorer"] == "lcb, sdpo, strict"
    assert evaluation_facts(RunConfig(), tasks[-1:])["scorer"] is None


def test_there_are_no_chance_scores_without_listed_options():
    assert chance_scores([*TASKS, question("4", "x", "")], [1]) is None
    assert chance_scores([*TASKS, question("4", "x", "ABCD", "exact")], [1]) is None
    assert chance_scores([], [1]) is None


def samples(pattern, task_id, domain, **fields):
    return [Sample(task_id, domain, c == "A", float(c == "A"), None if c == "." else c, **fields) for c in pattern]


ALL = [*samples("AABC", "1", "x"), *samples("BBBB", "2", "x"), *samples("AA.A", "3", "y")]


def table_of(results, chance):
    text = StringIO()
    print_table(results, chance, Console(file=text, width=100))
    return text.getvalue()


def test_results_are_pooled_by_domain_and_averaged(tmp_path):
    unscored = [Sample("1", "x", False, 0.0, status="sandbox_error")] * 3
    everything = [*ALL, *unscored]
    phase = Phase(everything, score_samples(everything, [1, 2]))
    results = results_of({"method": "m"}, {"last": phase})
    write_results(RunDir(tmp_path), results, {"last": phase})
    assert results == json.loads((tmp_path / "results.json").read_text())
    last = results["phases"]["last"]
    assert last["avg"] == pytest.approx((0.5 + 0 + 0.75) / 3)
    assert last["domain_mean"]["avg"] == pytest.approx((0.25 + 0.75) / 2)
    assert last["headroom_at"]["2"] == pytest.approx(last["pass_at"]["2"] - last["avg"])
    assert last["best_of"] == pytest.approx(last["pass_at"])  # chosen by the verifier itself
    assert last["domain_mean"]["headroom_at"]["2"] == pytest.approx(
        np.mean([part["headroom_at"]["2"] for part in last["by_domain"].values()])
    )
    assert last["by_domain"]["y"]["avg_error"] is None  # one question has no spread
    assert (last["num_samples"], last["num_unscored"]) == (12, 3)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 15
    third = [(row["sample"], row["answer"]) for row in rows if row["task_id"] == "3"]
    assert third == [(0, "A"), (1, "A"), (2, None), (3, "A")]
    printed = table_of(results, chance_scores(TASKS, [1, 2]))
    for words in ("last checkpoint", "mean of domains", "chance", "41.7", "50.0", "3 samples could not be verified"):
        assert words in printed
    assert "…" not in printed


def test_a_table_says_what_was_in_the_prompt_and_on_what_the_best_was_chosen():
    phase = Phase(ALL, score_samples(ALL, [1, 2])).as_json()
    plain = table_of({"method": "m", "phases": {"best": phase, "best_other_domains": phase}}, None)
    assert "no memory in the prompt" in plain
    assert "best checkpoint, other domains" in plain
    assert "chosen on test" not in plain
    results = {"method": "m", "phases": {"best": phase}, "selected_on": "test", "memory": {"store": "runs/a", "k": 3}}
    marked = table_of(results, None)
    assert "WITH MEMORY in the prompt: runs/a, k=3" in " ".join(marked.split())
    assert "best checkpoint (chosen on test)" in marked
    assert "no memory" not in marked


def test_the_best_checkpoint_has_a_row_where_it_is_not_the_last():
    phase, better = (Phase(each, score_samples(each, [1, 2])).as_json() for each in (ALL, ALL[:4]))
    same = table_of({"method": "m", "phases": {"last": phase | {"memory_conditioned": 0.5}, "best": phase}}, None)
    assert "best checkpoint  " not in same
    assert "The best checkpoint is the last one." in same
    differs = table_of({"method": "m", "phases": {"last": phase, "best": better}}, None)
    assert "best checkpoint  " in differs
    assert "is the last one" not in differs


def test_bare_rewards_have_no_columns_of_answers():
    rewarded = [Sample(task, "x", right, float(right)) for task in "ab" for right in (True, False)]
    phase = Phase(rewarded, score_samples(rewarded, [1, 2])).as_json()
    headings = table_of({"method": "m", "phases": {"last": phase}}, None).split("last checkpoint")[0]
    assert "m: 2 test tasks x 2 samples, no memory in the prompt" in headings  # on one line, though the table is narrow
    assert [word in headings for word in ("room", "maj", "cover", "valid")] == [True, False, False, False]


def test_a_table_is_titled_by_its_split():
    phase = Phase(ALL, score_samples(ALL, [1, 2])).as_json()
    assert "m: 3 validation tasks x 4" in table_of({"method": "m", "split": "validation", "phases": {"x": phase}}, None)


def test_best_of_n_selects_by_public_tests_and_is_judged_by_the_others():
    """One sample passes only the public test, one all but the public test, one all tests."""
    public_only, hidden_only, whole = CaseCounts(3, 1, 1, 1), CaseCounts(3, 2, 1, 0), CaseCounts(3, 3, 1, 1)
    given = [Sample("1", "", t is whole, float(t is whole), None, "ok", t) for t in (public_only, hidden_only, whole)]
    scores = score_samples(given, [1, 2, 3])
    assert scores.best_of == pytest.approx({1: 2 / 3, 2: (0 + 1 / 2 + 1) / 3, 3: 1 / 2})
    assert scores.pass_at[3] == 1.0
    assert scores.passed_tests == pytest.approx((1 / 3 + 2 / 3 + 1) / 3)
    assert scores.valid_rate == 1.0
    printed = table_of({"method": "m", "phases": {"last": Phase(given, scores).as_json()}}, None)
    assert "tests" in printed
    assert "best" in printed


def test_the_plot_works_with_any_number_of_samples(tmp_path):
    for number, given in enumerate((ALL, samples("A", "1", "x"), samples("..", "1", "x"))):
        path = tmp_path / f"{number}.png"
        draw_pass_at(path, {"initial": given, "last": ALL}, TASKS, "title")
        assert path.read_bytes().startswith(b"\x89PNG")
    assert chosen_ks(1) == [1]
    assert chosen_ks(16)[-1] == 16
    assert len(chosen_ks(1000)) <= 64

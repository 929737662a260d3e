"""`pmd runs` says of each run what its files say, without torch, whatever else lies there."""

import json
import os

import pytest

from pmd.cli.runs import find_runs, main, sort_runs
from pmd.run_lock import locked

ROW = "step,verify/avg\n0,0.25\n5,0.5\n6,\n"


@pytest.fixture
def runs(tmp_path):
    for name, files in {
        "done": {"config.yaml": "method: pmd\nseed_everything: 3\n", "metrics.csv": ROW,
                 "results.json": json.dumps({"phases": {"last": {"avg": 0.931}}})},
        "deep/er": {"config.yaml": "method: grpo\n", "metrics.csv": ROW, "checkpoints/last.ckpt": ""},
        "broken": {"config.yaml": ":\n- [", "results.json": "{", "metrics.csv": "x\n\0"},
        "no_run": {"notes.txt": "method: pmd"},
    }.items():  # fmt: skip
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return tmp_path


def test_each_run_is_described_by_its_files(runs):
    found = {str(run.path.relative_to(runs)): run for run in find_runs(runs)}
    assert set(found) == {"done", "deep/er", "broken"}
    assert [(run.method, run.seed, run.state, run.step) for run in (found["done"], found["deep/er"])] == [
        ("pmd", "3", "finished", 7),
        ("grpo", "-", "stopped", 7),
    ]
    assert (found["done"].score, found["done"].is_final) == (0.931, True)
    assert (found["deep/er"].score, found["deep/er"].is_final) == (0.5, False)
    assert (found["broken"].state, found["broken"].score) == ("failed", None)


def test_a_run_in_use_is_running(runs):
    with locked(runs / "deep/er"):
        assert {run.path.name: run.state for run in find_runs(runs)}["er"] == "running"


def test_rows_are_sorted(runs):
    for seconds, name in enumerate(("deep/er", "done", "broken")):
        for file in (runs / name).iterdir():
            os.utime(file, (seconds, seconds))
    found = find_runs(runs)
    orders = {by: [run.path.name for run in sort_runs(found, by)] for by in ("changed", "name", "score", "method")}
    assert orders == {
        "changed": ["broken", "done", "er"],
        "name": ["broken", "er", "done"],
        "score": ["done", "er", "broken"],
        "method": ["broken", "er", "done"],
    }


def test_the_table_and_the_lines(runs, capsys):
    assert main([str(runs)]) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("done", "93.1", "(50.0)", "finished", "stopped", "failed"))
    assert main([str(runs), "--json"]) == 0
    assert {json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()} == {
        "finished", "stopped", "failed",
    }  # fmt: skip
    (runs / "empty").mkdir()
    assert main([str(runs / "empty")]) == 0
    assert "start one with" in capsys.readouterr().out
